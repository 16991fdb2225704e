// What an instruction set provides: a table of functions on tiles of one or two panels (16 or 32 rows).
//
// Tokens come in "token panels" [C/32, T, line], zero-padded columns, so a kernel walks them with one pointer. A line is
// 32 columns of a token in the form in which a table multiplies (see Form). Sums are float32 [T, 32]: 16 per panel.
#pragma once
#include <cstdint>

#include "moestro_cpu.h"

namespace moestro {

constexpr int kPanel = 16;      // rows
constexpr int kBlock = 16;      // columns of a block of codes; they share a scale
constexpr int kChunk = 32;      // columns of a token panel's lines (64 bytes)
constexpr int kCodeBytes = 128; // of 16 rows x 16 columns of fp4
constexpr int kTileRows = 2 * kPanel;

enum class Form {  // of a line
  kBf16,   // 32 bf16; a float16 x takes two lines and a float32 x three, added up (numbers.h)
  kFloat,  // 32 float32
  kInt16,  // 32 int16, then two float32: what a unit of each half is worth, times 2^-9 (weights are 512 times too large)
  kInt8,   // 32 int8 in the order of fp4 codes, then float32: half of what a unit is worth, and 12 times the sum of each
           // half in it (weights are kept as 12 + 2 e2m1, never negative); 4 bytes are left over
  kBytes,  // 32 int16 in two planes of 32 int8, 256 times the first and the second, in the order of fp4 codes; then two
           // float32: half of what a unit of each half is worth
};

constexpr int line_of(Form form) {  // in uint16
  return form == Form::kBf16 ? 32 : form == Form::kFloat ? 64 : form == Form::kInt8 ? 24 : 36;
}

struct Tokens {
  const uint16_t* data;  // [C/32, T, line]
  int64_t stride;        // elements from a chunk of 32 columns to the next
  int count;             // T
};

// GCC takes a function that only prefetches for one without effects and drops its calls, unless it is inlined first.
#define MOESTRO_INLINE inline __attribute__((always_inline))

struct Codes {  // NVFP4, MXFP4 or FP8 panels, from some block on (an even one for MXFP4)
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t code_stride;   // bytes from a panel to the next
  int64_t scale_stride;
  int panels;            // 1 or 2
  const uint8_t *next, *next_scales;  // what will be read after these panels, to prefetch
  bool mx;               // a power of two (e8m0) per 32 columns instead of e4m3 per 16

  const uint8_t* scale(int panel, int block) const {
    return scales + panel * scale_stride + (mx ? block / 2 : block) * kPanel;
  }
};

// Codes and scales to ask for while one panel is read after the other: `ahead` blocks further on in the stream that the
// panels of a tile are, and then where the next tile begins. An address that moves, not one worked out for each block.
struct StreamAhead {
  const uint8_t *codes, *scales, *next, *next_scales;
  int64_t pair_scales;  // bytes of two blocks'
  int turn;             // the block from which what is asked for is the next tile's

  MOESTRO_INLINE StreamAhead(const Codes& from, int panel, int blocks, int ahead)
      : codes(from.codes + panel * from.code_stride + ahead * kCodeBytes), scales(from.scale(panel, ahead / 2 * 2)),
        next(from.next), next_scales(from.next_scales), pair_scales(from.mx ? kPanel : 2 * kPanel),
        turn(((from.panels - panel) * blocks - ahead + 1) / 2 * 2) {
    if (turn <= 0) codes = next - turn * kCodeBytes, scales = next_scales - turn / 2 * pair_scales;
  }
  MOESTRO_INLINE void two_blocks(int b) {  // for blocks b and b + 1
    if (b == turn && b > 0) codes = next, scales = next_scales;
    for (int i = 0; i < 4; ++i) __builtin_prefetch(codes + 64 * i, 0, 3);
    __builtin_prefetch(scales, 0, 3);
    codes += 2 * kCodeBytes, scales += pair_scales;
  }
};

struct Int4Codes;  // int4.h

struct Dense {  // panels of bf16 or of what decode() made, from some pair of columns on
  const uint16_t* data;
  int64_t stride;  // elements from a panel to the next
  int panels;
};

struct Pending {          // codes to decode: all of them or none are when a product returns
  Codes from{};
  int blocks = 0;             // of each panel
  uint16_t* dense = nullptr;  // [panels, blocks * 8, 16, 2], 64-byte aligned
  int done = 0;               // blocks, of all panels

  int left() const { return blocks * from.panels - done; }
};

struct Ahead {            // for the products after this one: codes to decode, and weights to ask for
  const uint8_t* at = nullptr;
  int64_t stride = 0;   // bytes from a panel to the next
  int lines = 0;        // of 64 bytes, of each of two panels
  Pending next{};
  const uint8_t* scales = nullptr;  // asked for with the lines, one after each `every`: at once they wait for each other
  int64_t scale_stride = 0;
  int every = 1 << 30;  // a power of two

  // Into L1, though it is full of decoded weights and tokens: L2 then has them when they are read. Asked for into L2 alone
  // (prefetcht1), products waited (Zen 5): bf16 of 32 tokens was 6 % slower, AVX2's NVFP4 of 4 to 16 tokens 6 %.
  MOESTRO_INLINE void ask(int count) {
    for (; count > 0 && lines > 0; --count, --lines, at += 64) {
      __builtin_prefetch(at, 0, 3);
      __builtin_prefetch(at + stride, 0, 3);
      if ((lines & (every - 1)) != 0) continue;
      __builtin_prefetch(scales, 0, 3);
      __builtin_prefetch(scales + scale_stride, 0, 3);
      scales += 64;
    }
  }
};

struct Epilogue {            // of the first product, for one tile
  const float* row_scale;    // [32] or null (1)
  const float* bias;         // [32] or null (0)
  int activation;
  float alpha, limit, up_shift;
  int x_type;
};

inline int parts_of(int x_type) { return 1 + x_type; }  // lines of a token in bf16: bf16 1, fp16 2, fp32 3

struct Kernels {
  Form form = Form::kBf16;
  int decoded_block = kBlock * kPanel;  // uint16 of a block of a panel that decode() made
  // sums += codes * tokens over `blocks` blocks of 16 columns, decoding in registers; null: decode and multiply instead
  void (*direct)(const Codes&, int blocks, const Tokens&, float* sums) = nullptr;
  // up to so many tokens `direct_split` instead, with the same sums: lines of another form, which `split` makes of lines
  int split_most = 0, split_line = 0;
  void (*split)(const Tokens&, int blocks, uint16_t* to) = nullptr;
  void (*direct_split)(const Codes&, int blocks, const Tokens&, float* sums) = nullptr;
  // e2m1 * scale exactly, to bf16 panels [panels, blocks * 8, 16, 2]; integer forms: integers and scales, see there
  void (*decode)(const Codes&, int blocks, uint16_t* dense) = nullptr;
  // e4m3 * 2^-8 to bf16 panels
  void (*decode_fp8)(const Codes&, int blocks, uint16_t* dense) = nullptr;
  // int4: integers to bf16 panels, of one group, null: in plain C++; and as `direct`, whole rows
  void (*decode_int4)(const Codes&, int blocks, uint16_t* dense) = nullptr;
  void (*direct_int4)(const Int4Codes&, const Tokens&, float* sums) = nullptr;
  // sums += dense * tokens over `blocks` blocks of 16 columns; meanwhile asks for all of `ahead`, may decode its codes
  void (*multiply)(const Dense&, int blocks, const Tokens&, float* sums, Ahead& ahead) = nullptr;
  // activation(sums * row_scale + bias) of gate panel and up panel, as half 0 or 1 of lines [T, line] ...
  void (*activate_gated)(const Epilogue&, const float* sums, int tokens, int half, uint16_t* lines) = nullptr;
  // ... or, without a gate, of one or two panels; in float32 lines if there is a quantize()
  void (*activate)(const Epilogue&, const float* sums, int tokens, int panels, uint16_t* lines) = nullptr;
  // float32 lines to this form's
  void (*quantize)(const uint16_t* lines, int tokens, uint16_t* to) = nullptr;
  // result[token[t]] += weight[t] * (sums * row_scale + bias), on `columns` columns
  void (*combine)(const Epilogue&, const float* sums, int tokens, int columns, const int32_t* token,
                  const float* weight, float* result, int64_t result_stride) = nullptr;
  // a row of x to its lines; and float32 to x's type, count a multiple of 16
  void (*gather)(int x_type, const void* row, int64_t columns, uint16_t* to, int64_t stride) = nullptr;
  void (*store_result)(int x_type, const float* from, void* to, int64_t count) = nullptr;
  // on each thread before its first and after its last product of a region; may be null
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;

  int parts(int x_type) const { return form == Form::kBf16 ? parts_of(x_type) : 1; }
};

// Multiplications and additions in `rounds` rounds of an arithmetic; 0: there is none.
using Spin = int64_t (*)(int arithmetic, int64_t rounds);

inline bool is_fp4(int format) { return format == MOESTRO_NVFP4 || format == MOESTRO_MXFP4; }

const Kernels* kernels_generic(const MoestroLayer& layer);
const Kernels* kernels_amx_emulated(const MoestroLayer& layer);
#if defined(__x86_64__)
const Kernels* kernels_avx2(const MoestroLayer& layer);
const Kernels* kernels_avx_vnni(const MoestroLayer& layer);
const Kernels* kernels_avx512(const MoestroLayer& layer);
const Kernels* kernels_amx(const MoestroLayer& layer);
int64_t spin_avx2(int arithmetic, int64_t rounds);
int64_t spin_avx_vnni(int arithmetic, int64_t rounds);
int64_t spin_avx512(int arithmetic, int64_t rounds);
int64_t spin_amx(int arithmetic, int64_t rounds);
#elif defined(__aarch64__)
const Kernels* kernels_neon(const MoestroLayer& layer);
const Kernels* kernels_neon_dot(const MoestroLayer& layer);
const Kernels* kernels_neon_bf16(const MoestroLayer& layer);
int64_t spin_neon(int arithmetic, int64_t rounds);
int64_t spin_neon_dot(int arithmetic, int64_t rounds);
int64_t spin_neon_bf16(int arithmetic, int64_t rounds);
#endif
int64_t spin_generic(int arithmetic, int64_t rounds);
bool has_isa(int isa);                                // this build and this machine
const Kernels* kernels_of(const MoestroLayer& layer);  // null if this machine lacks them

// Call work(context, worker) once on each of at most `threads` threads, workers numbered from 0; returns when all have.
void parallel(int threads, void (*work)(void*, int), void* context);

template <class F>
void parallel(int threads, F&& body) {
  parallel(threads, [](void* f, int worker) { (*static_cast<F*>(f))(worker); }, const_cast<void*>(
      static_cast<const void*>(&body)));
}

}  // namespace moestro

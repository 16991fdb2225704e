// What an instruction set provides: a table of functions on tiles of one or two panels (16 or 32 rows).
//
// Tokens come in "token panels": bf16 [C/32, T, 32], zero-padded columns, so a kernel walks them with one pointer.
// Sums are float32 [T, 32]: 16 per panel.
#pragma once
#include <cstdint>

#include "moestro_cpu.h"

namespace moestro {

constexpr int kPanel = 16;      // rows
constexpr int kBlock = 16;      // columns of a block of codes; they share a scale
constexpr int kChunk = 32;      // columns of a token panel's lines (64 bytes)
constexpr int kCodeBytes = 128; // of 16 rows x 16 columns of fp4
constexpr int kTileRows = 2 * kPanel;

struct Tokens {
  const uint16_t* data;  // [C/32, stride/32, 32]
  int64_t stride;        // elements from a chunk of 32 columns to the next
  int count;             // T
};

struct Codes {  // NVFP4 or MXFP4 panels, from some block on (an even one for MXFP4)
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

struct Dense {  // bf16 panels, from some pair of columns on
  const uint16_t* data;
  int64_t stride;  // elements from a panel to the next
  int panels;
};

// GCC takes a function that only prefetches for one without effects and drops its calls, unless it is inlined first.
#define MOESTRO_INLINE inline __attribute__((always_inline))

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

  MOESTRO_INLINE void ask(int count) {  // for L2: decoded weights and tokens fill L1
    for (; count > 0 && lines > 0; --count, --lines, at += 64) {
      __builtin_prefetch(at, 0, 2);
      __builtin_prefetch(at + stride, 0, 2);
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

inline int parts_of(int x_type) { return 1 + x_type; }  // lines of a token: bf16 1, fp16 2, fp32 3

struct Kernels {
  // sums += codes * tokens over `blocks` blocks of 16 columns, decoding in registers; null: decode and multiply instead
  void (*direct)(const Codes&, int blocks, const Tokens&, float* sums);
  // e2m1 * scale, exactly, to bf16 panels [panels, blocks * 8, 16, 2]
  void (*decode)(const Codes&, int blocks, uint16_t* dense);
  // sums += dense * tokens over `blocks` blocks of 16 columns; meanwhile asks for all of `ahead`, and may decode its codes
  void (*multiply)(const Dense&, int blocks, const Tokens&, float* sums, Ahead& ahead);
  // activation(sums * row_scale + bias) in parts: gate panel and up panel to 16 columns of a token panel ...
  void (*activate_gated)(const Epilogue&, const float* sums, int tokens, uint16_t* out);
  // ... or, without a gate, one or two panels to 16 or 32 columns
  void (*activate)(const Epilogue&, const float* sums, int tokens, int panels, uint16_t* out);
  // result[token[t]] += weight[t] * (sums * row_scale + bias), on `columns` columns
  void (*combine)(const Epilogue&, const float* sums, int tokens, int columns, const int32_t* token,
                  const float* weight, float* result, int64_t result_stride);
  // a row of x to its lines (numbers.h); and float32 to x's type, count a multiple of 16
  void (*gather)(int x_type, const void* row, int64_t columns, uint16_t* to, int64_t stride);
  void (*store_result)(int x_type, const float* from, void* to, int64_t count);
  // on each thread before its first and after its last product of a region; may be null
  void (*enter)();
  void (*leave)();
};

const Kernels* kernels_generic();
const Kernels* kernels_amx_emulated();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();
#endif
const Kernels* kernels_of(int isa);  // null if this machine lacks it

// Call work(context, worker) once on each of at most `threads` threads, workers numbered from 0; returns when all have.
void parallel(int threads, void (*work)(void*, int), void* context);

template <class F>
void parallel(int threads, F&& body) {
  parallel(threads, [](void* f, int worker) { (*static_cast<F*>(f))(worker); }, const_cast<void*>(
      static_cast<const void*>(&body)));
}

}  // namespace moestro

// NEON (Advanced SIMD, of every 64-bit ARM): decoding in registers, and products with tokens in float32.
//
// A 16-byte load of codes is four rows by eight columns. Its low and its high nibbles are bytes of table look-ups (tbl),
// whose two results, zipped (trn), are bf16 pairs as in the panels; shifts widen them, and a multiplication by the scale
// is exact (6 significant bits). A token's columns are lanes of a multiply-add: nothing is broadcast. Every path adds
// the same products in the same order, so a row has the same bits however many tokens it is multiplied with.
#pragma once
#include <arm_neon.h>

#include "epilogue.h"
#include "int4.h"
#include "quantize.h"

namespace moestro {
namespace {

constexpr int kQuads = 4;  // of rows in a panel

inline float32x4_t even_of(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
inline float32x4_t odd_of(uint32x4_t pairs) {
  return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000u)));
}
inline uint32x4_t pairs_at(const uint16_t* at) { return vreinterpretq_u32_u16(vld1q_u16(at)); }

// e4m3 has the bits of a half of 2^-8 times its value (the 2^8 is in the row scale); eight bytes to the halves' bits.
inline float16x8_t halves_of(uint8x8_t e4m3) {
  const uint16x8_t wide = vmovl_u8(e4m3);
  return vreinterpretq_f16_u16(vorrq_u16(vshlq_n_u16(vandq_u16(wide, vdupq_n_u16(0x80)), 8),
                                         vshlq_n_u16(vandq_u16(wide, vdupq_n_u16(0x7F)), 7)));
}

struct Scales {  // of a block's 16 rows
  float32x4_t of[kQuads];

  MOESTRO_INLINE Scales(const uint8_t* scales, bool mx) {
    const uint8x16_t bytes = vld1q_u8(scales);
    if (mx) {  // e8m0: the bits of a float's exponent
      const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
      const uint32x4_t wide[kQuads] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low),
                                       vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)};
      for (int q = 0; q < kQuads; ++q) of[q] = vreinterpretq_f32_u32(vshlq_n_u32(wide[q], 23));
    } else {
      const float16x8_t low = halves_of(vget_low_u8(bytes)), high = halves_of(vget_high_u8(bytes));
      of[0] = vcvt_f32_f16(vget_low_f16(low)), of[1] = vcvt_high_f32_f16(low);
      of[2] = vcvt_f32_f16(vget_low_f16(high)), of[3] = vcvt_high_f32_f16(high);
    }
  }
};

struct IntegerBytes {  // of the bf16 of -16 to 15
  uint8_t low[32], high[32];

  constexpr IntegerBytes() : low{}, high{} {
    for (int i = 0; i < 32; ++i) {
      const int value = i - 16, size = value < 0 ? -value : value;
      int exponent = 0;
      while (size >> (exponent + 1)) ++exponent;
      const int bits = size ? (127 + exponent) << 7 | (size << (7 - exponent) & 127) | (value < 0 ? 0x8000 : 0) : 0;
      low[i] = static_cast<uint8_t>(bits & 255), high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr IntegerBytes kIntegerBytes;

// Four rows of half a block, eight columns: four bf16 pairs of each row, without the scale.
struct Quad {
  uint32x4_t pairs[4];

  // int4: `shift` is 16 less the zero point, of each byte's row
  MOESTRO_INLINE Quad(const uint8_t* codes, uint8x16_t shift) {
    const uint8x16x2_t low = {vld1q_u8(kIntegerBytes.low), vld1q_u8(kIntegerBytes.low + 16)};
    const uint8x16x2_t high = {vld1q_u8(kIntegerBytes.high), vld1q_u8(kIntegerBytes.high + 16)};
    const uint8x16_t line = vld1q_u8(codes);
    const uint8x16_t first = vaddq_u8(vandq_u8(line, vdupq_n_u8(15)), shift);
    const uint8x16_t second = vaddq_u8(vshrq_n_u8(line, 4), shift);
    zip(vqtbl2q_u8(low, first), vqtbl2q_u8(high, first), vqtbl2q_u8(low, second), vqtbl2q_u8(high, second));
  }

  MOESTRO_INLINE explicit Quad(const uint8_t* codes) {
    constexpr uint8_t kLow[16] = {0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0, 0, 0, 0x80, 0xC0, 0, 0x40, 0x80, 0xC0};
    constexpr uint8_t kHigh[16] = {0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                                   0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
    const uint8x16_t low = vld1q_u8(kLow), high = vld1q_u8(kHigh), line = vld1q_u8(codes);
    const uint8x16_t first = vandq_u8(line, vdupq_n_u8(15)), second = vshrq_n_u8(line, 4);
    zip(vqtbl1q_u8(low, first), vqtbl1q_u8(high, first), vqtbl1q_u8(low, second), vqtbl1q_u8(high, second));
  }

 private:
  MOESTRO_INLINE void zip(uint8x16_t low0, uint8x16_t high0, uint8x16_t low1, uint8x16_t high1) {
    pairs[0] = vreinterpretq_u32_u8(vtrn1q_u8(low0, high0));
    pairs[1] = vreinterpretq_u32_u8(vtrn1q_u8(low1, high1));
    pairs[2] = vreinterpretq_u32_u8(vtrn2q_u8(low0, high0));
    pairs[3] = vreinterpretq_u32_u8(vtrn2q_u8(low1, high1));
  }
};

void decode(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int b = 0; b < blocks; ++b) {
      const Scales scales(from.scale(p, b), from.mx);
      for (int half = 0; half < 2; ++half, dense += 4 * kTileRows)
        for (int q = 0; q < kQuads; ++q, codes += 16) {
          const Quad quad(codes);
          for (int j = 0; j < 4; ++j) {
            const uint32x4_t even = vreinterpretq_u32_f32(vmulq_f32(even_of(quad.pairs[j]), scales.of[q]));
            const uint32x4_t odd = vreinterpretq_u32_f32(vmulq_f32(odd_of(quad.pairs[j]), scales.of[q]));
            vst1q_u16(dense + j * kTileRows + 8 * q, vreinterpretq_u16_u32(vsriq_n_u32(odd, even, 16)));
          }
        }
    }
  }
}

void decode_fp8(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int i = 0; i < blocks * kBlock * kPanel; i += 8, dense += 8) {
      const float16x8_t halves = halves_of(vld1_u8(codes + i));
      const uint16x8_t low = vreinterpretq_u16_f32(vcvt_f32_f16(vget_low_f16(halves)));
      vst1q_u16(dense, vuzp2q_u16(low, vreinterpretq_u16_f32(vcvt_high_f32_f16(halves))));
    }
  }
}

void decode_int4(const Codes& from, int blocks, uint16_t* dense) {
  constexpr uint8_t kRows[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};  // of a line's bytes
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    const uint8x16_t zeros = from.scales ? vld1q_u8(from.scales + p * from.scale_stride) : vdupq_n_u8(kSymmetric);
    uint8x16_t shift[kQuads];
    for (int q = 0; q < kQuads; ++q)
      shift[q] = vqtbl1q_u8(vsubq_u8(vdupq_n_u8(16), zeros), vaddq_u8(vld1q_u8(kRows), vdupq_n_u8(4 * q)));
    for (int half = 0; half < 2 * blocks; ++half, dense += 4 * kTileRows)
      for (int q = 0; q < kQuads; ++q, codes += 16) {
        const Quad quad(codes, shift[q]);
        for (int j = 0; j < 4; ++j) vst1q_u16(dense + j * kTileRows + 8 * q, vreinterpretq_u16_u32(quad.pairs[j]));
      }
  }
}

// Codes and scales 2 KiB ahead of a block, over the end of a panel into what is read next.
inline void ask_block(const Codes& from, int panel, int blocks, int b) {
  constexpr int kAhead = 16;
  const bool here = b + kAhead < blocks, last = panel + 1 == from.panels;
  const int at = here ? b + kAhead : b + kAhead - blocks;
  const int64_t p = here ? panel : last ? 0 : panel + 1;
  const uint8_t* codes = (here || !last ? from.codes : from.next) + p * from.code_stride + at * kCodeBytes;
  __builtin_prefetch(codes);
  __builtin_prefetch(codes + 64);
  if (b % 4 != 0) return;  // four blocks' scales are a line
  const uint8_t* scales = (here || !last ? from.scales : from.next_scales) + p * from.scale_stride;
  __builtin_prefetch(scales + (from.mx ? at / 2 : at) * kPanel);
}

template <int T>
struct Sums {  // of T tokens by a panel
  float32x4_t of[T][kQuads];

  MOESTRO_INLINE explicit Sums(const float* sums) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) of[t][q] = vld1q_f32(sums + t * kTileRows + 4 * q);
  }
  MOESTRO_INLINE void store(float* sums) const {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) vst1q_f32(sums + t * kTileRows + 4 * q, of[t][q]);
  }
};

// sums += two columns of four rows, times lanes 2 * kPair and 2 * kPair + 1 of each token's four columns.
template <int T, int kPair>
MOESTRO_INLINE void add_pair(Sums<T>& sums, int q, float32x4_t even, float32x4_t odd, const float32x4_t* x) {
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) sums.of[t][q] = vfmaq_laneq_f32(sums.of[t][q], even, x[t], 2 * kPair);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) sums.of[t][q] = vfmaq_laneq_f32(sums.of[t][q], odd, x[t], 2 * kPair + 1);
}

template <int T, int kPair>
MOESTRO_INLINE void add_scaled(Sums<T>& sums, int q, uint32x4_t pairs, float32x4_t scale, const float32x4_t* x) {
  add_pair<T, kPair>(sums, q, vmulq_f32(even_of(pairs), scale), vmulq_f32(odd_of(pairs), scale), x);
}

template <int T>
MOESTRO_INLINE void load_columns(const float* at, float32x4_t* x) {  // four of each token
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) x[t] = vld1q_f32(at + t * kChunk);
}

inline const float* floats_of(const Tokens& x, int block) {
  return reinterpret_cast<const float*>(x.data + block / 2 * x.stride) + block % 2 * kBlock;
}

// One panel of codes by T tokens.
template <int T>
void direct_float(const Codes& from, int panel, int blocks, const Tokens& x, float* sums) {
  Sums<T> total(sums);
  const uint8_t* codes = from.codes + panel * from.code_stride;
  for (int b = 0; b < blocks; ++b) {
    ask_block(from, panel, blocks, b);
    const Scales scales(from.scale(panel, b), from.mx);
    const float* at = floats_of(x, b);
    for (int half = 0; half < 2; ++half, at += kBlock / 2) {
      float32x4_t left[T], right[T];
      load_columns<T>(at, left);
      load_columns<T>(at + 4, right);
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q, codes += 16) {
        const Quad quad(codes);
        const float32x4_t scale = scales.of[q];
        add_scaled<T, 0>(total, q, quad.pairs[0], scale, left);
        add_scaled<T, 1>(total, q, quad.pairs[1], scale, left);
        add_scaled<T, 0>(total, q, quad.pairs[2], scale, right);
        add_scaled<T, 1>(total, q, quad.pairs[3], scale, right);
      }
    }
  }
  total.store(sums);
}

// One panel of bf16 by T tokens.
template <int T>
void multiply_float(const uint16_t* line, int blocks, const Tokens& x, float* sums) {
  Sums<T> total(sums);
  for (int b = 0; b < blocks; ++b) {
    const float* at = floats_of(x, b);
    for (int pair = 0; pair < kBlock / 2; pair += 2, line += 2 * kTileRows, at += 4) {
      float32x4_t columns[T];
      load_columns<T>(at, columns);
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) {
        const uint32x4_t first = pairs_at(line + 8 * q), second = pairs_at(line + kTileRows + 8 * q);
        add_pair<T, 0>(total, q, even_of(first), odd_of(first), columns);
        add_pair<T, 1>(total, q, even_of(second), odd_of(second), columns);
      }
    }
  }
  total.store(sums);
}

// Calls body<T>(first token) for pieces of at most kMost tokens, of equal size give or take one.
template <int T, class F>
MOESTRO_INLINE void with_count(int count, F&& body) {
  if constexpr (T == 1) {
    body.template operator()<1>();
  } else {
    if (count == T) return body.template operator()<T>();
    with_count<T - 1>(count, body);
  }
}

template <int kMost, class F>
MOESTRO_INLINE void each_piece(int tokens, F&& body) {
  const int pieces = (tokens + kMost - 1) / kMost;
  for (int i = 0; i < pieces; ++i) {
    const int from = tokens * i / pieces, count = tokens * (i + 1) / pieces - from;
    with_count<kMost>(count, [&]<int T>() { body.template operator()<T>(from); });
  }
}

inline Tokens tokens_from(const Tokens& x, int first, int line) {
  return {x.data + first * line, x.stride, x.count - first};
}

// 4 tokens by 16 rows of sums are half of the 32 registers, decoded weights and the tokens' columns the rest; 5 where
// weights come two registers at a time: then two operations widen what ten multiply.
constexpr int kDirectTokens = 4, kDenseTokens = 5;

void direct(const Codes& from, int blocks, const Tokens& x, float* sums) {
  for (int p = 0; p < from.panels; ++p)
    each_piece<kDirectTokens>(x.count, [&]<int T>(int first) {
      direct_float<T>(from, p, blocks, tokens_from(x, first, kFloatLine), sums + first * kTileRows + p * kPanel);
    });
}

void multiply(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int all = w.panels * ((x.count + kDenseTokens - 1) / kDenseTokens), ask = (ahead.lines + all - 1) / all;
  for (int p = 0; p < w.panels; ++p)
    each_piece<kDenseTokens>(x.count, [&]<int T>(int first) {
      ahead.ask(ask);
      multiply_float<T>(w.data + p * w.stride, blocks, tokens_from(x, first, kFloatLine),
                        sums + first * kTileRows + p * kPanel);
    });
}

}  // namespace
}  // namespace moestro

// NEON: products of 4-bit codes in integers, over the dot products of neon_dots.h.
//
// e2m1 doubled is an integer of at most 12: a byte of one look-up, where the codes lie, and four bytes are four columns of
// a row, as a dot product takes them. A bf16 token becomes int16 with a power of two per 16 columns, as in quantize.h, and
// is kept in two planes of bytes: 256 times the first (in [-127, 127]) and the second (in [-128, 127]), added up exactly
// in a block's int32 sum, which then meets the token's scale and the block's. So sums are the same bits in every path.
#pragma once
#include "neon.h"
#include "neon_dots.h"

namespace moestro {
namespace {

constexpr int kBytesLine = line_of(Form::kBytes);

// 16 values, which bf16 holds. The largest is brought into [2^14, 2^15), but for one with all bits set, which would need
// 128 in its first byte: that is brought below 2^14.
inline void put_bytes(const float* values, int half, uint16_t* line) {
  const uint32_t most = largest_bits<kPanel>(values), up = most + 0x10000u;
  const bool finite = most < kNotFinite;
  const uint32_t exponent = up >> 23 < 24 ? 24 : up >> 23;
  const float unit = finite ? float_of((exponent - 14 - 1) << 23) : float_of(0x7FC00000u);
  const float to_integer = finite ? float_of((127 + 127 + 14 - exponent) << 23) : 0.f;
  alignas(16) int32_t q[kPanel];
  for (int i = 0; i < kPanel; ++i)
    q[i] = static_cast<int32_t>(bits_of((finite ? values[i] : 0.f) * to_integer + kRound) - bits_of(kRound));
  auto* bytes = reinterpret_cast<int8_t*>(line) + half * kPanel;
  for (int i = 0; i < kPanel; ++i) {
    const int32_t value = q[i / 8 * 8 + kByteColumn[i % 8]], high = (value + 128) >> 8;
    bytes[i] = static_cast<int8_t>(high);
    bytes[kChunk + i] = static_cast<int8_t>(value - 256 * high);
  }
  std::memcpy(line + kChunk + 2 * half, &unit, 4);
}

inline void bytes_chunk(const float* values, uint16_t* line) {
  put_bytes(values, 0, line);
  put_bytes(values + kPanel, 1, line);
}

struct BytesLine {
  static int size(int) { return kBytesLine; }
  static void put(int type, const float* a, int half, uint16_t* to) {
    alignas(64) float rounded[kPanel];
    round_to(type, a, rounded);
    put_bytes(rounded, half, to);
  }
};

struct Words {  // int16 in two planes: 32 bytes, 32 bytes, and what a unit of each half is worth
  static constexpr int kLine = kBytesLine;

  static float unit(const uint16_t* line, int b) { return reinterpret_cast<const float*>(line + kChunk)[b % 2]; }
  MOESTRO_INLINE static int32x4_t sum(const int8x16_t* w, const uint16_t* line, int b) {
    const auto* bytes = reinterpret_cast<const int8_t*>(line) + b % 2 * kBlock;
    const int32x4_t high = dot_block(vdupq_n_s32(0), w, vld1q_s8(bytes));
    return dot_block(vshlq_n_s32(high, 8), w, vld1q_s8(bytes + kChunk));
  }
};

struct Bytes {  // int8, as quantize.h puts it; weights are signed here, so its offset is not needed
  static constexpr int kLine = kInt8Line;

  static float unit(const uint16_t* line, int) { return *reinterpret_cast<const float*>(line + kChunk / 2); }
  MOESTRO_INLINE static int32x4_t sum(const int8x16_t* w, const uint16_t* line, int b) {
    return dot_block(vdupq_n_s32(0), w, vld1q_s8(reinterpret_cast<const int8_t*>(line) + b % 2 * kBlock));
  }
};

// Four rows of a block: four groups of four columns, from the codes of both halves.
MOESTRO_INLINE void unpack_quad(const uint8_t* codes, int q, int8x16_t* w) {
  constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const int8x16_t table = vld1q_s8(kTwice);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint8x16_t line = vld1q_u8(codes + 64 * half + 16 * q);
    w[2 * half] = vqtbl1q_s8(table, vandq_u8(line, vdupq_n_u8(15)));
    w[2 * half + 1] = vqtbl1q_s8(table, vshrq_n_u8(line, 4));
  }
}

template <class Int, int T>
MOESTRO_INLINE void add_quad(Sums<T>& total, int q, const int8x16_t* w, float32x4_t scale, const uint16_t* line, int b) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const uint16_t* of = line + t * Int::kLine;
    const float32x4_t sum = vmulq_n_f32(vcvtq_f32_s32(Int::sum(w, of, b)), Int::unit(of, b));
    total.of[t][q] = vfmaq_f32(total.of[t][q], sum, scale);
  }
}

template <class Int, int T>
void direct_panel(const Codes& from, int panel, int blocks, const Tokens& x, float* sums) {
  Sums<T> total(sums);
  const uint8_t* codes = from.codes + panel * from.code_stride;
  for (int b = 0; b < blocks; ++b, codes += kCodeBytes) {
    ask_block(from, panel, blocks, b);
    const Scales scales(from.scale(panel, b), from.mx);
    const uint16_t* line = x.data + b / 2 * x.stride;
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      int8x16_t w[4];
      unpack_quad(codes, q, w);
      add_quad<Int, T>(total, q, w, scales.of[q], line, b);
    }
  }
  total.store(sums);
}

template <class Int>
void direct_integers(const Codes& from, int blocks, const Tokens& x, float* sums) {
  for (int p = 0; p < from.panels; ++p)
    each_piece<kDirectTokens>(x.count, [&]<int T>(int first) {
      direct_panel<Int, T>(from, p, blocks, tokens_from(x, first, Int::kLine), sums + first * kTileRows + p * kPanel);
    });
}

// Blocks of [4 quads of rows, 4 groups of columns] registers, then the scales of 16 rows.
constexpr int kDecodedBytes = kBlock * kPanel / 2 + 2 * kPanel;  // in uint16

void decode_integers(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int b = 0; b < blocks; ++b, codes += kCodeBytes, dense += kDecodedBytes) {
      const Scales scales(from.scale(p, b), from.mx);
      auto* to = reinterpret_cast<int8_t*>(dense);
      auto* factors = reinterpret_cast<float*>(dense + kDecodedBytes) - kPanel;
      for (int q = 0; q < kQuads; ++q) {
        int8x16_t w[4];
        unpack_quad(codes, q, w);
        for (int group = 0; group < 4; ++group) vst1q_s8(to + 64 * q + 16 * group, w[group]);
        vst1q_f32(factors + 4 * q, scales.of[q]);
      }
    }
  }
}

template <class Int, int T>
void multiply_panel(const uint16_t* dense, int blocks, const Tokens& x, float* sums) {
  Sums<T> total(sums);
  for (int b = 0; b < blocks; ++b, dense += kDecodedBytes) {
    const auto* bytes = reinterpret_cast<const int8_t*>(dense);
    const auto* scales = reinterpret_cast<const float*>(dense + kDecodedBytes) - kPanel;
    const uint16_t* line = x.data + b / 2 * x.stride;
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q, bytes += 64) {
      const int8x16_t w[4] = {vld1q_s8(bytes), vld1q_s8(bytes + 16), vld1q_s8(bytes + 32), vld1q_s8(bytes + 48)};
      add_quad<Int, T>(total, q, w, vld1q_f32(scales + 4 * q), line, b);
    }
  }
  total.store(sums);
}

template <class Int>
void multiply_integers(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int all = w.panels * ((x.count + kDirectTokens - 1) / kDirectTokens), ask = (ahead.lines + all - 1) / all;
  for (int p = 0; p < w.panels; ++p)
    each_piece<kDirectTokens>(x.count, [&]<int T>(int first) {
      ahead.ask(ask);
      multiply_panel<Int, T>(w.data + p * w.stride, blocks, tokens_from(x, first, Int::kLine),
                             sums + first * kTileRows + p * kPanel);
    });
}

}  // namespace
}  // namespace moestro

// INT4 in AVX-512: a nibble less its row's zero point is one of 32 integers, which vpermw looks up as bf16.
//
// 32 codes take 0.75 shifts, an and, an addition and the look-up, whether there are zero points or not.
#pragma once
#include "avx512.h"
#include "int4.h"

namespace moestro {
namespace {

struct Integers {
  alignas(64) uint16_t of[32];  // bf16 of -16 .. 15
  constexpr Integers() : of() {
    for (int i = 0; i < 32; ++i) {
      const int value = i - 16, size = value < 0 ? -value : value;
      int exponent = 127, mantissa = size;
      for (; mantissa > 1; mantissa >>= 1) ++exponent;
      const int rest = size ? (size << 7 >> (exponent - 127)) & 127 : 0;
      of[i] = size ? static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | exponent << 7 | rest) : uint16_t{0};
    }
  }
};
alignas(64) constexpr Integers kIntegers;

inline __m512i offsets_of(const uint8_t* zeros) {  // 16 - zero of each row, for both words of a row
  if (!zeros) return _mm512_set1_epi16(16 - kSymmetric);
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  return _mm512_sub_epi16(_mm512_set1_epi16(16), _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)));
}

MOESTRO_INLINE __m512i integer_pairs(__m512i table, __m512i line, __m512i offset, int j) {
  const __m512i nibbles = _mm512_and_si512(j ? _mm512_srli_epi16(line, 4 * j) : line, _mm512_set1_epi16(15));
  return _mm512_permutexvar_epi16(_mm512_add_epi16(nibbles, offset), table);
}

inline __m512 group_scales(const uint8_t* scales, int type) {  // of 16 rows
  if (type == MOESTRO_X_FP32) return _mm512_loadu_ps(scales);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  if (type == MOESTRO_X_FP16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

void decode_int4(const Codes& from, int blocks, uint16_t* dense) {
  const __m512i table = _mm512_load_si512(kIntegers.of);
  for (int p = 0; p < from.panels; ++p) {
    const __m512i offset = offsets_of(from.scales ? from.scales + p * from.scale_stride : nullptr);
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int half = 0; half < 2 * blocks; ++half, codes += 64) {
      const __m512i line = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, dense += kTileRows) _mm512_store_si512(dense, integer_pairs(table, line, offset, j));
    }
  }
}

template <int P, int T>
inline void int4_few(const Int4Codes& from, const Tokens& x, float* sums) {
  const __m512i table = _mm512_load_si512(kIntegers.of);
  const int64_t scale_row = kPanel * scale_bytes(from.scale_type), blocks = from.groups * from.group_blocks;
  __m512 total[T][P];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) total[t][p] = _mm512_loadu_ps(sums + t * kTileRows + p * kPanel);
  int64_t b = 0;
  for (int64_t g = 0; g < from.groups; ++g) {
    __m512 sum[T][P];
    __m512i offset[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const int64_t at = p * from.groups + g;
      offset[p] = offsets_of(from.zeros ? from.zeros + at * kPanel : nullptr);
      _mm_prefetch(reinterpret_cast<const char*>(from.scales + (at + 4) * scale_row), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[t][p] = _mm512_setzero_ps();
    }
    for (int i = 0; i < from.group_blocks; ++i, ++b) {
      const uint8_t* ask = b + kAhead < blocks ? from.codes + (b + kAhead) * kCodeBytes
                                               : from.next + (b + kAhead - blocks) * kCodeBytes;
      const uint16_t* at = x.data + b / 2 * x.stride + b % 2 * kBlock;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, at += kBlock / 2) {
        __m512i line[P];
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const int64_t byte = p * from.code_stride + 64 * half;
          line[p] = _mm512_loadu_si512(from.codes + b * kCodeBytes + byte);
          _mm_prefetch(reinterpret_cast<const char*>(ask + byte), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          __m512i w[P];
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) w[p] = integer_pairs(table, line[p], offset[p], j);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const __m512bh pair = pair_of(at + t * kChunk + 2 * j);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) sum[t][p] = _mm512_dpbf16_ps(sum[t][p], (__m512bh)w[p], pair);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m512 scale = group_scales(from.scales + (p * from.groups + g) * scale_row, from.scale_type);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) total[t][p] = _mm512_fmadd_ps(sum[t][p], scale, total[t][p]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(sums + t * kTileRows + p * kPanel, total[t][p]);
}

template <int P>
void int4_panels(const Int4Codes& from, const Tokens& x, float* sums) {
  for (int t = 0; t < x.count; t += 4) {  // decoded anew for each four
    const Tokens part{x.data + t * kChunk, x.stride, x.count - t};
    float* to = sums + t * kTileRows;
    switch (part.count) {
      case 1: int4_few<P, 1>(from, part, to); break;
      case 2: int4_few<P, 2>(from, part, to); break;
      case 3: int4_few<P, 3>(from, part, to); break;
      default: int4_few<P, 4>(from, part, to); break;
    }
  }
}

void direct_int4(const Int4Codes& from, const Tokens& x, float* sums) {
  if (from.panels == 2)
    int4_panels<2>(from, x, sums);
  else
    int4_panels<1>(from, x, sums);
}

}  // namespace
}  // namespace moestro

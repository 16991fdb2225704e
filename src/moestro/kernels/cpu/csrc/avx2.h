// AVX2 with FMA and F16C: decoding to bf16, and products of bf16 weights with tokens in float32.
//
// bf16 is widened by shifts, eight rows a register. Six tokens by 16 rows of sums take twelve registers, and of 24
// multiplications a round 14 loads and 2 shifts: the ports of multiplication are what limits.
#pragma once
#include <immintrin.h>

#include "epilogue.h"
#include "int4.h"
#include "quantize.h"

namespace moestro {
namespace {

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000u))));
}

// Of 8 rows: e4m3 * 2^-8 (the 2^8 is in the row scale), or e8m0, whose bits are a float's exponent.
inline __m256 block_scales(const uint8_t* scales, bool mx) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
  if (mx) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
}

// The low nibble of each 16-bit lane to bf16: its two bytes from two tables, blended.
inline __m256i e2m1_to_bf16(__m256i lanes) {
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
      0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
  const __m256i nibble = _mm256_and_si256(lanes, _mm256_set1_epi16(15));
  const __m256i both = _mm256_or_si256(nibble, _mm256_slli_epi16(nibble, 8));
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(low, both), _mm256_shuffle_epi8(high, both),
                            _mm256_set1_epi16(static_cast<int16_t>(0xFF00u)));
}

// The product has 6 significant bits, so cutting float32 is exact.
inline __m256i times_scale(__m256i pairs, __m256 scale) {
  const __m256i even = _mm256_castps_si256(_mm256_mul_ps(even_of(pairs), scale));
  const __m256i odd = _mm256_castps_si256(_mm256_mul_ps(odd_of(pairs), scale));
  return _mm256_or_si256(_mm256_srli_epi32(even, 16), odd);
}

void decode(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int b = 0; b < blocks; ++b, codes += kCodeBytes)
      for (int half = 0; half < 2; ++half, dense += 4 * kTileRows)
        for (int rows = 0; rows < 2; ++rows) {  // eight at a time
          const __m256 scale = block_scales(from.scale(p, b) + 8 * rows, from.mx);
          const __m256i line = load(codes + 64 * half + 32 * rows);
          __m256i* to = reinterpret_cast<__m256i*>(dense) + rows;
          _mm256_storeu_si256(to, times_scale(e2m1_to_bf16(line), scale));
          _mm256_storeu_si256(to + 2, times_scale(e2m1_to_bf16(_mm256_srli_epi16(line, 4)), scale));
          _mm256_storeu_si256(to + 4, times_scale(e2m1_to_bf16(_mm256_srli_epi16(line, 8)), scale));
          _mm256_storeu_si256(to + 6, times_scale(e2m1_to_bf16(_mm256_srli_epi16(line, 12)), scale));
        }
  }
}

// e4m3 has the bits of a half of 2^-8 times its value; bf16 holds that exactly.
inline __m256i e4m3_to_bf16(__m128i bytes) {  // 16 of them
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  const __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi16(0x80));  // 0x80 << 7 twice is a half's sign
  const __m256i half = _mm256_add_epi16(_mm256_slli_epi16(wide, 7), _mm256_slli_epi16(sign, 7));
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(low), 16),
                                             _mm256_srli_epi32(_mm256_castps_si256(high), 16));
  return _mm256_permute4x64_epi64(packed, 0xD8);
}

void decode_fp8(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int i = 0; i < blocks * kBlock; ++i, codes += 16, dense += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dense),
                          e4m3_to_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
}

// The low nibble of each 16-bit lane less the zero point of its row, to bf16.
inline __m256i integer_to_bf16(__m256i lanes, __m256i zero) {
  const __m256i value = _mm256_sub_epi16(_mm256_and_si256(lanes, _mm256_set1_epi16(15)), zero);
  const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(value, 16), 16));
  const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(value, 16));
  return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd));
}

void decode_int4(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    __m256i zero[2] = {_mm256_set1_epi16(kSymmetric), _mm256_set1_epi16(kSymmetric)};
    for (int rows = 0; from.scales && rows < 2; ++rows) {
      const auto* eight = reinterpret_cast<const __m128i*>(from.scales + p * from.scale_stride + 8 * rows);
      const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight));
      zero[rows] = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
    }
    for (int half = 0; half < 2 * blocks; ++half, codes += 64, dense += 4 * kTileRows)
      for (int rows = 0; rows < 2; ++rows) {
        const __m256i line = load(codes + 32 * rows);
        __m256i* to = reinterpret_cast<__m256i*>(dense) + rows;
        _mm256_storeu_si256(to, integer_to_bf16(line, zero[rows]));
        _mm256_storeu_si256(to + 2, integer_to_bf16(_mm256_srli_epi16(line, 4), zero[rows]));
        _mm256_storeu_si256(to + 4, integer_to_bf16(_mm256_srli_epi16(line, 8), zero[rows]));
        _mm256_storeu_si256(to + 6, integer_to_bf16(_mm256_srli_epi16(line, 12), zero[rows]));
      }
  }
}

constexpr int kStreamAhead = 2048;  // elements: 4 KiB; a panel goes on where the one before ends (2 KiB: as without)

// One panel by T tokens, asked for ahead: hardware alone read 10 % slower. Of what comes after the piece, `ask` lines are asked for with each chunk of columns: all at once, at the
// beginning of a panel, they waited for each other while nothing was multiplied (see docs/cpu.md).
template <int T>
inline void multiply_float(const uint16_t* line, int blocks, const Tokens& x, float* sums, Ahead& ahead, int ask) {
  __m256 c[T][2];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    c[t][0] = _mm256_loadu_ps(sums + t * kTileRows);
    c[t][1] = _mm256_loadu_ps(sums + t * kTileRows + 8);
  }
  const uint16_t* chunk = x.data;
  for (int left = blocks * 8; left > 0; left -= 16, chunk += x.stride) {
    const auto* values = reinterpret_cast<const float*>(chunk);
    const int pairs = left < 16 ? left : 16;
    ahead.ask(ask);
    for (int j = 0; j < pairs; ++j, line += kTileRows, values += 2) {
      const __m256i first = load(line), second = load(line + 16);
      _mm_prefetch(reinterpret_cast<const char*>(line + kStreamAhead), _MM_HINT_T0);
      const __m256 even0 = even_of(first), even1 = even_of(second);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const __m256 even = _mm256_broadcast_ss(values + t * kChunk);
        c[t][0] = _mm256_fmadd_ps(even0, even, c[t][0]);
        c[t][1] = _mm256_fmadd_ps(even1, even, c[t][1]);
      }
      const __m256 odd0 = odd_of(first), odd1 = odd_of(second);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const __m256 odd = _mm256_broadcast_ss(values + t * kChunk + 1);
        c[t][0] = _mm256_fmadd_ps(odd0, odd, c[t][0]);
        c[t][1] = _mm256_fmadd_ps(odd1, odd, c[t][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    _mm256_storeu_ps(sums + t * kTileRows, c[t][0]);
    _mm256_storeu_ps(sums + t * kTileRows + 8, c[t][1]);
  }
}

// Two panels at once by up to three tokens, each sum in the order of multiply_float: there a line of 64 bytes, two additions
// to the same sum after each other, takes 8 cycles however few its tokens are, which is 32 GB/s.
constexpr int kPairTokens = 3;

template <int T>
inline void multiply_pair(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int chunks = (blocks + 1) / 2, ask = (ahead.lines + chunks - 1) / chunks;
  __m256 c[T][4];
#pragma GCC unroll 3
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) c[t][i] = _mm256_loadu_ps(sums + t * kTileRows + 8 * i);
  const uint16_t *line = w.data, *chunk = x.data;
  for (int left = blocks * 8; left > 0; left -= 16, chunk += x.stride) {
    const auto* values = reinterpret_cast<const float*>(chunk);
    const int pairs = left < 16 ? left : 16;
    ahead.ask(ask);
    for (int j = 0; j < pairs; ++j, line += kTileRows, values += 2)
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const uint16_t* at = line + p * w.stride;
        _mm_prefetch(reinterpret_cast<const char*>(at + kStreamAhead), _MM_HINT_T0);
        const __m256i first = load(at), second = load(at + 16);
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) {
          const __m256 even = _mm256_broadcast_ss(values + t * kChunk), odd = _mm256_broadcast_ss(values + t * kChunk + 1);
          c[t][2 * p] = _mm256_fmadd_ps(odd_of(first), odd, _mm256_fmadd_ps(even_of(first), even, c[t][2 * p]));
          c[t][2 * p + 1] = _mm256_fmadd_ps(odd_of(second), odd, _mm256_fmadd_ps(even_of(second), even, c[t][2 * p + 1]));
        }
      }
  }
#pragma GCC unroll 3
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(sums + t * kTileRows + 8 * i, c[t][i]);
}

// Runs Tile<T>(panel p, tokens from t on) for all panels and tokens: one of at most kWhole, or several of at most kMost and
// of equal size give or take one; each asks for as much of what is ahead with each chunk of its columns.
template <template <int> class Tile, int kMost, int kWhole>
inline void each_tile(const Dense& w, int blocks, const Tokens& x, int line, float* sums, Ahead& ahead) {
  const int pieces = x.count <= kWhole ? 1 : (x.count + kMost - 1) / kMost, all = pieces * w.panels;
  const int chunks = all * ((blocks + 1) / 2), ask = (ahead.lines + chunks - 1) / chunks;
  for (int p = 0; p < w.panels; ++p)
    for (int i = 0; i < pieces; ++i) {
      const int from = x.count * i / pieces, count = x.count * (i + 1) / pieces - from;
      const Tokens part{x.data + from * line, x.stride, count};
      const uint16_t* at = w.data + p * w.stride;
      float* to = sums + from * kTileRows + p * kPanel;
      switch (count) {
        case 1: Tile<1>::run(at, blocks, part, to, ahead, ask); break;
        case 2: Tile<2>::run(at, blocks, part, to, ahead, ask); break;
        case 3: Tile<3>::run(at, blocks, part, to, ahead, ask); break;
        case 4: Tile<4>::run(at, blocks, part, to, ahead, ask); break;
        case 5: Tile<5>::run(at, blocks, part, to, ahead, ask); break;
        default: Tile<6>::run(at, blocks, part, to, ahead, ask); break;
      }
    }
}

template <int T>
struct FloatTile {
  static void run(const uint16_t* line, int blocks, const Tokens& x, float* sums, Ahead& ahead, int ask) {
    multiply_float<T>(line, blocks, x, sums, ahead, ask);
  }
};

void multiply(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  if (w.panels == 2 && x.count <= kPairTokens) {
    if (x.count == 1) return multiply_pair<1>(w, blocks, x, sums, ahead);
    if (x.count == 2) return multiply_pair<2>(w, blocks, x, sums, ahead);
    return multiply_pair<3>(w, blocks, x, sums, ahead);
  }
  each_tile<FloatTile, 6, 6>(w, blocks, x, kFloatLine, sums, ahead);
}

}  // namespace
}  // namespace moestro

// Products and decoding in AVX-512, shared by the AVX-512 and the AMX tables.
//
// Instruction counts decide (Zen 5: two dot products, or two vpermw, a cycle): 32 codes become bf16 by 0.75 shifts and
// one vpermw, whose five index bits are a nibble and one bit of the next, hence a table that repeats after 16.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace moestro {
namespace {

inline __m512i e2m1_table() {
  alignas(64) static const uint16_t table[32] = {
      0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,  // 0, .5, 1, 1.5, 2, 3, 4, 6
      0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0,
      0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
      0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
  return _mm512_load_si512(table);
}

// Of 16 rows: e4m3 * 2^-8 (the 2^8 is in the row scale), or e8m0, whose bits are a float's exponent.
inline __m512 block_scales(const uint8_t* scales, bool mx) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  if (mx) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
}

inline __m512bh pair_of(const uint16_t* x) {  // two columns of a token, to all rows
  int32_t pair;
  __builtin_memcpy(&pair, x, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline void unpack_half(__m512i table, const uint8_t* codes, __m512i* w) {  // 4 pairs of columns
  const __m512i line = _mm512_loadu_si512(codes);
  w[0] = _mm512_permutexvar_epi16(line, table);
  w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), table);
  w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), table);
  w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), table);
}

inline void unpack_codes(__m512i table, const uint8_t* codes, __m512i* w) {  // a block: 8 pairs of columns
  unpack_half(table, codes, w);
  unpack_half(table, codes + 64, w + 4);
}

constexpr int kAhead = 16;  // blocks to prefetch ahead: 2 KiB of a panel; 1 KiB and 4 KiB were slower

// Ask for a block of each panel and its scales, kAhead blocks ahead: in this tile, or where the next one begins.
template <int P>
MOESTRO_INLINE void ask_block(const Codes& from, int blocks, int b) {
  const bool here = b + kAhead < blocks;
  const int at = here ? b + kAhead : b + kAhead - blocks;
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    const uint8_t* codes = (here ? from.codes : from.next) + p * from.code_stride + at * kCodeBytes;
    _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + 64), _MM_HINT_T0);
    if (b % 4 != 0) continue;  // four blocks' scales are a line
    const uint8_t* scales = (here ? from.scales : from.next_scales) + p * from.scale_stride;
    _mm_prefetch(reinterpret_cast<const char*>(scales + (from.mx ? at / 2 : at) * kPanel), _MM_HINT_T0);
  }
}

// Few tokens: their sums stay in registers. A block is decoded once, multiplied by all tokens, and its scale meets the
// sum of its 16 columns. One panel after the other, which is one stream of codes, and asked for kStreamAhead blocks ahead:
// two panels at once were 10 to 20 % slower with 1 to 4 tokens of an expert, 32 or 64 blocks ahead 3 to 10 %.
constexpr int kFew = 12, kStreamAhead = 48;

template <int T>
MOESTRO_INLINE void few_block(const uint8_t* codes, const uint8_t* scales, bool mx, const uint16_t* x, __m512* total) {
  const __m512i table = e2m1_table();
  __m512 sum[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i w[4];
    unpack_half(table, codes + 64 * half, w);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t)
        sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)w[j], pair_of(x + t * kChunk + 8 * half + 2 * j));
  }
  const __m512 scale = block_scales(scales, mx);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) total[t] = _mm512_fmadd_ps(sum[t], scale, total[t]);
}

template <int T>
inline void direct_few(const Codes& from, int panel, int blocks, const Tokens& x, float* sums) {
  const int64_t pair_scales = from.mx ? kPanel : 2 * kPanel;
  const uint8_t *codes = from.codes + panel * from.code_stride, *scales = from.scales + panel * from.scale_stride;
  StreamAhead ask(from, panel, blocks, kStreamAhead);
  const uint16_t* line = x.data;
  __m512 total[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) total[t] = _mm512_loadu_ps(sums + t * kTileRows);
  for (int b = 0; b < blocks; b += 2, line += x.stride) {
    ask.two_blocks(b);
    few_block<T>(codes, scales, from.mx, line, total);
    if (b + 1 < blocks)
      few_block<T>(codes + kCodeBytes, from.mx ? scales : scales + kPanel, from.mx, line + kBlock, total);
    codes += 2 * kCodeBytes, scales += pair_scales;
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums + t * kTileRows, total[t]);
}

template <int T>
void direct_few_of(const Codes& from, int blocks, const Tokens& x, float* sums) {
  if constexpr (T > 1)
    if (x.count < T) return direct_few_of<T - 1>(from, blocks, x, sums);
  for (int p = 0; p < from.panels; ++p) direct_few<T>(from, p, blocks, x, sums + p * kPanel);
}

// More tokens: the same of two panels at once, with a block's weights in registers and the sums in memory.
template <int P>
inline void direct_many(const Codes& from, int blocks, const Tokens& x, float* sums) {
  const __m512i table = e2m1_table();
  for (int b = 0; b < blocks; ++b) {
    ask_block<P>(from, blocks, b);
    __m512i w[P][8];
    __m512 scale[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      unpack_codes(table, from.codes + p * from.code_stride + b * kCodeBytes, w[p]);
      scale[p] = block_scales(from.scale(p, b), from.mx);
    }
    const uint16_t* at = x.data + b / 2 * x.stride + b % 2 * kBlock;
    for (int t = 0; t < x.count; ++t, at += kChunk) {
      __m512 sum[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[p] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m512bh pair = pair_of(at + 2 * j);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[p] = _mm512_dpbf16_ps(sum[p], (__m512bh)w[p][j], pair);
      }
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        float* to = sums + t * kTileRows + p * kPanel;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sum[p], scale[p], _mm512_loadu_ps(to)));
      }
    }
  }
}

void direct(const Codes& from, int blocks, const Tokens& x, float* sums) {
  if (x.count <= kFew)
    direct_few_of<kFew>(from, blocks, x, sums);
  else if (from.panels == 2)
    direct_many<2>(from, blocks, x, sums);
  else
    direct_many<1>(from, blocks, x, sums);
}

// Decoding is a product of e2m1 (3 bits of magnitude) and 1.mmm (3 bits of the scale), looked up among 64 of vpermi2w, and
// the scale's exponent, added in integers: 5.5 operations for 32 weights. Nothing is rounded: 6 bits are significant.
// The table's exponents are 128 too high, and those of the scale are taken off complemented, with saturation: 0 stays 0.
struct Products {
  alignas(64) uint16_t of[64];  // [mmm][magnitude], bf16 times 2^128, which takes the sign's bit as well
  constexpr Products() : of() {
    for (int m = 0; m < 8; ++m)
      for (int code = 1; code < 8; ++code) {
        const int magnitude = code < 2 ? code : (2 + code % 2) << (code / 2 - 1);  // 1, 2, 3, 4, 6, 8, 12: times 2
        int product = magnitude * (8 + m), exponent = 3;                           // times 2^4; of 8 bits after that
        for (; product < 128; product *= 2) --exponent;
        of[8 * m + code] = static_cast<uint16_t>((exponent + 127 + 128) << 7 | (product & 127));
      }
  }
};
alignas(64) constexpr Products kProducts;

struct BlockScale {  // of 16 rows, as a product wants it
  __m512i mantissa;  // the upper three bits at 3 .. 5
  __m512i less;      // the exponent complemented; takes everything off where the scale is 0

  MOESTRO_INLINE BlockScale(const uint8_t* scales, bool mx) {
    const __m512i bits = _mm512_castps_si512(block_scales(scales, mx));
    const __m512i scale = _mm512_or_si512(bits, _mm512_srli_epi32(bits, 16));  // bf16, for both columns
    mantissa = _mm512_srli_epi16(scale, 1);
    less = _mm512_mask_andnot_epi32(_mm512_set1_epi32(-1), _mm512_test_epi32_mask(bits, bits), scale,
                                    _mm512_set1_epi16(0x7F80));
  }
};

// Pair j of columns of the eight of a block.
MOESTRO_INLINE void decode_pair(const uint8_t* codes, int j, const BlockScale& scale, bool mx, uint16_t* dense) {
  const int shift = 4 * (j % 4);
  const __m512i line = _mm512_loadu_si512(codes + 64 * (j / 4));
  const __m512i code = shift ? _mm512_srli_epi16(line, shift) : line;
  const __m512i sign = shift < 12 ? _mm512_slli_epi16(line, 12 - shift) : line;
  const __m512i index = _mm512_ternarylogic_epi32(code, scale.mantissa, _mm512_set1_epi16(7), 0xE4);  // 7 ? code : mantissa
  const __m512i table = _mm512_load_si512(kProducts.of), upper = _mm512_load_si512(kProducts.of + 32);
  __m512i product = _mm512_subs_epu16(_mm512_permutex2var_epi16(table, index, upper), scale.less);
  if (mx) product = _mm512_min_epu16(product, _mm512_set1_epi16(0x7F80));  // or infinite, signed
  _mm512_store_si512(dense + j * kTileRows, _mm512_ternarylogic_epi32(sign, product, _mm512_set1_epi16(-0x8000), 0xEC));
}

MOESTRO_INLINE void decode_block(const uint8_t* codes, const uint8_t* scales, bool mx, uint16_t* dense) {
  const BlockScale scale(scales, mx);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) decode_pair(codes, j, scale, mx, dense);
}

void decode(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p)
    for (int b = 0; b < blocks; ++b, dense += kBlock * kPanel)
      decode_block(from.codes + p * from.code_stride + b * kCodeBytes, from.scale(p, b), from.mx, dense);
}

struct NextBlock {  // of what is pending
  const uint8_t *codes, *scales;
  uint16_t* dense;

  MOESTRO_INLINE explicit NextBlock(Pending& next) {
    const int p = next.done >= next.blocks, b = next.done - p * next.blocks;
    codes = next.from.codes + p * next.from.code_stride + b * kCodeBytes, scales = next.from.scale(p, b);
    dense = next.dense + next.done * kBlock * kPanel;
    ++next.done;
  }
};

MOESTRO_INLINE void decode_some(Pending& next, int count) {
  for (; count > 0 && next.left() > 0; --count) {
    const NextBlock at(next);
    decode_block(at.codes, at.scales, next.from.mx, at.dense);
  }
}

struct Share {  // of what is ahead, for each chunk of columns of each tile of tokens
  int ask, decode;
};

// P panels by T tokens of sums in registers: 2 x 12 leave room for the weights and the broadcast pair, and need
// 14 loads for 24 dot products.
struct PanelTile {
  static constexpr int kMost = 12;

  // A pair of columns at `line` and `chunk`.
  template <int P, int T>
  static MOESTRO_INLINE void pair(const uint16_t* line, int64_t stride, const uint16_t* chunk, __m512 (*c)[T]) {
    __m512bh row[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) row[p] = (__m512bh)_mm512_loadu_si512(line + p * stride);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512bh pair = pair_of(chunk + t * kChunk);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) c[p][t] = _mm512_dpbf16_ps(c[p][t], row[p], pair);
    }
  }

  // A block's eight, and amid each of them an eighth of a block that is pending.
  template <int P, int T>
  static MOESTRO_INLINE void pairs_decoding(const uint16_t* line, int64_t stride, const uint16_t* chunk, __m512 (*c)[T],
                                            Pending& next) {
    const NextBlock at(next);
    const BlockScale scale(at.scales, next.from.mx);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      pair<P, T>(line + j * kTileRows, stride, chunk + 2 * j, c);
      decode_pair(at.codes, j, scale, next.from.mx, at.dense);
    }
  }

  template <int P, int T>
  static inline void run(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead, Share work) {
    __m512 c[P][T];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) c[p][t] = _mm512_loadu_ps(sums + t * kTileRows + p * kPanel);
    const uint16_t* line = w.data;
    const uint16_t* chunk = x.data;
    for (int left = blocks; left > 0; left -= 2, chunk += x.stride) {
      ahead.ask(work.ask);
      decode_some(ahead.next, work.decode - 2);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t)  // T lines, then a jump: a pattern that hardware does not follow; another core made them
        _mm_prefetch(reinterpret_cast<const char*>(chunk + 2 * x.stride + t * kChunk), _MM_HINT_T0);
      for (int half = 0; half < 2 && half < left; ++half, line += 8 * kTileRows) {
        if (work.decode > half && ahead.next.left() > 0)
          pairs_decoding<P, T>(line, w.stride, chunk + half * kBlock, c, ahead.next);
        else
          for (int j = 0; j < 8; ++j) pair<P, T>(line + j * kTileRows, w.stride, chunk + half * kBlock + 2 * j, c);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) _mm512_storeu_ps(sums + t * kTileRows + p * kPanel, c[p][t]);
  }
};

// All of x's tokens, as tiles of at most Tile::kMost; Tile::run<P, T> multiplies one of P panels by T tokens.
template <class Tile, int P, int T>
void tile_of(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead, Share work) {
  if constexpr (T == 1) {
    Tile::template run<P, 1>(w, blocks, x, sums, ahead, work);
  } else {
    if (x.count == T) return Tile::template run<P, T>(w, blocks, x, sums, ahead, work);
    tile_of<Tile, P, T - 1>(w, blocks, x, sums, ahead, work);
  }
}

template <class Tile>
void in_tiles(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int pieces = (x.count + Tile::kMost - 1) / Tile::kMost;
  const int chunks = pieces * ((blocks + 1) / 2);
  const Share work{(ahead.lines + chunks - 1) / chunks, (ahead.next.left() + chunks - 1) / chunks};
  for (int i = 0; i < pieces; ++i) {  // of equal size, give or take one
    const int from = x.count * i / pieces, count = x.count * (i + 1) / pieces - from;
    const Tokens part{x.data + from * kChunk, x.stride, count};
    if (w.panels == 2)
      tile_of<Tile, 2, Tile::kMost>(w, blocks, part, sums + from * kTileRows, ahead, work);
    else
      tile_of<Tile, 1, Tile::kMost>(w, blocks, part, sums + from * kTileRows, ahead, work);
  }
}

void multiply(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  in_tiles<PanelTile>(w, blocks, x, sums, ahead);
}

// e4m3 has the bits of a half of 2^-8 times its value; bf16 holds that exactly.
void decode_fp8(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int i = 0; i < blocks * kBlock / 2; ++i, codes += kTileRows, dense += kTileRows) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      const __m512i half = _mm512_add_epi16(_mm512_slli_epi16(wide, 7),  // 80 << 7 twice: the sign
                                            _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x80)), 7));
      const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
      const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
      _mm512_store_si512(dense, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

}  // namespace
}  // namespace moestro

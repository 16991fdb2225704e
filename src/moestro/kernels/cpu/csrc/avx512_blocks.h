// Batch invariance of 4-bit codes in AVX-512: many tokens by the operations of direct(), in its order.
//
// direct() sums 16 columns from zero and then gives them their scale. Here codes are decoded to bf16 without it, which is one
// look-up for 32 of them, the scales lie behind each block as float32, and two panels by six tokens keep both sums in
// registers: 108 operations where multiply() has 96. Until 24 tokens of an expert direct() itself runs: no cost at all.
#pragma once
#include "avx512.h"

namespace moestro {
namespace {

constexpr int kBlockAndScales = kBlock * kPanel + 2 * kPanel;  // uint16 of a block of a panel

MOESTRO_INLINE void decode_with_scales(const Codes& from, int p, int b, uint16_t* dense) {
  __m512i w[8];
  unpack_codes(e2m1_table(), from.codes + p * from.code_stride + b * kCodeBytes, w);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) _mm512_store_si512(dense + j * kTileRows, w[j]);
  _mm512_store_ps(dense + kBlock * kPanel, block_scales(from.scale(p, b), from.mx));
}

void decode_blocks(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p)
    for (int b = 0; b < blocks; ++b, dense += kBlockAndScales) decode_with_scales(from, p, b, dense);
}

MOESTRO_INLINE void decode_some_blocks(Pending& next, int count) {  // amid products, as decode_some() does
  for (; count > 0 && next.left() > 0; --count, ++next.done) {
    const int p = next.done >= next.blocks;
    decode_with_scales(next.from, p, next.done - p * next.blocks, next.dense + next.done * kBlockAndScales);
  }
}

// total += a decoded block of P panels by T tokens at `x`.
template <int P, int T>
MOESTRO_INLINE void add_blocks(const uint16_t* dense, int64_t stride, const uint16_t* x, __m512 (*total)[P]) {
  __m512 sum[T][P];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) sum[t][p] = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    __m512bh row[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) row[p] = (__m512bh)_mm512_load_si512(dense + p * stride + j * kTileRows);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m512bh pair = pair_of(x + t * kChunk + 2 * j);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[t][p] = _mm512_dpbf16_ps(sum[t][p], row[p], pair);
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    const __m512 scale = _mm512_load_ps(dense + p * stride + kBlock * kPanel);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[t][p] = _mm512_fmadd_ps(sum[t][p], scale, total[t][p]);
  }
}

struct BlocksTile {
  static constexpr int kMost = 6;

  template <int P, int T>
  static inline void run(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead, Share work) {
    __m512 total[T][P];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) total[t][p] = _mm512_loadu_ps(sums + t * kTileRows + p * kPanel);
    const uint16_t *dense = w.data, *line = x.data;
    for (int b = 0; b < blocks; b += 2, line += x.stride, dense += 2 * kBlockAndScales) {
      ahead.ask(work.ask);
      decode_some_blocks(ahead.next, work.decode);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) _mm_prefetch(reinterpret_cast<const char*>(line + 2 * x.stride + t * kChunk), _MM_HINT_T0);
      add_blocks<P, T>(dense, w.stride, line, total);
      if (b + 1 < blocks) add_blocks<P, T>(dense + kBlockAndScales, w.stride, line + kBlock, total);
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) _mm512_storeu_ps(sums + t * kTileRows + p * kPanel, total[t][p]);
  }
};

void multiply_blocks(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  in_tiles<BlocksTile>(w, blocks, x, sums, ahead);
}

}  // namespace
}  // namespace moestro

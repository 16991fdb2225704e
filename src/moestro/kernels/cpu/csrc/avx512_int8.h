// AVX-512 with VNNI: 4-bit codes times int8 tokens, as avx2_integers.h does it in 256 bits: a line of 64 bytes of codes is
// two registers of 16 rows by 4 columns, each one look-up (vpshufb).
#pragma once
#include "avx512.h"
#include "quantize.h"

namespace moestro {
namespace {

constexpr int kDecodedInt8 = kBlock * kPanel / 2 + 2 * kPanel;  // uint16 of a block: bytes, and scales in float32

inline __m512i int8_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

MOESTRO_INLINE void unpack_int8(__m512i table, const uint8_t* codes, __m512i* w) {  // four groups of 4 columns
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i line = _mm512_loadu_si512(codes + 64 * half), nibble = _mm512_set1_epi8(15);
    w[2 * half] = _mm512_shuffle_epi8(table, _mm512_and_si512(line, nibble));
    w[2 * half + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble));
  }
}

// sums += the block's products with a token at `line`.
MOESTRO_INLINE void add_int8(const __m512i* w, __m512 scale, const uint16_t* line, int b, float* sums) {
  const uint16_t *at = line + b % 2 * kBlock / 2, *facts = line + kChunk / 2;
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int group = 0; group < 4; ++group) sum = _mm512_dpbusd_epi32(sum, w[group], (__m512i)pair_of(at + 2 * group));
  float unit, offset;
  __builtin_memcpy(&unit, facts, 4);
  __builtin_memcpy(&offset, facts + 2 + b % 2 * 2, 4);
  const __m512 value = _mm512_fmsub_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit), _mm512_set1_ps(offset));
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(sums)));
}

// One panel after the other, as direct_few() reads them: 15 % faster with one or two tokens of an expert, 14 % slower with
// eight.
void direct_int8_few(const Codes& from, int blocks, const Tokens& x, float* sums) {
  const __m512i table = int8_table();
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    StreamAhead ask(from, p, blocks, kStreamAhead);
    for (int b = 0; b < blocks; ++b, codes += kCodeBytes) {
      if (b % 2 == 0) ask.two_blocks(b);
      __m512i w[4];
      unpack_int8(table, codes, w);
      const __m512 scale = block_scales(from.scale(p, b), from.mx);
      const uint16_t* line = x.data + b / 2 * x.stride;
      for (int t = 0; t < x.count; ++t, line += kInt8Line) add_int8(w, scale, line, b, sums + t * kTileRows + p * kPanel);
    }
  }
}

template <int P>
void direct_int8_panels(const Codes& from, int blocks, const Tokens& x, float* sums) {
  const __m512i table = int8_table();
  for (int b = 0; b < blocks; ++b) {
    ask_block<P>(from, blocks, b);
    __m512i w[P][4];
    __m512 scale[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      unpack_int8(table, from.codes + p * from.code_stride + b * kCodeBytes, w[p]);
      scale[p] = block_scales(from.scale(p, b), from.mx);
    }
    const uint16_t* line = x.data + b / 2 * x.stride;
    for (int t = 0; t < x.count; ++t, line += kInt8Line)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) add_int8(w[p], scale[p], line, b, sums + t * kTileRows + p * kPanel);
  }
}

void direct_int8(const Codes& from, int blocks, const Tokens& x, float* sums) {
  if (x.count <= 3)
    direct_int8_few(from, blocks, x, sums);
  else if (from.panels == 2)
    direct_int8_panels<2>(from, blocks, x, sums);
  else
    direct_int8_panels<1>(from, blocks, x, sums);
}

void decode_int8(const Codes& from, int blocks, uint16_t* dense) {
  const __m512i table = int8_table();
  for (int p = 0; p < from.panels; ++p)
    for (int b = 0; b < blocks; ++b, dense += kDecodedInt8) {
      __m512i w[4];
      unpack_int8(table, from.codes + p * from.code_stride + b * kCodeBytes, w);
      for (int group = 0; group < 4; ++group) _mm512_storeu_si512(dense + 32 * group, w[group]);
      _mm512_storeu_ps(dense + 128, block_scales(from.scale(p, b), from.mx));
    }
}

void multiply_int8(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int ask = (ahead.lines + blocks - 1) / blocks;
  for (int b = 0; b < blocks; ++b) {  // a block's weights stay in registers for all tokens
    ahead.ask(ask);
    const uint16_t* line = x.data + b / 2 * x.stride;
    __m512i weights[2][4];
    __m512 scale[2];
    for (int p = 0; p < w.panels; ++p) {
      const uint16_t* dense = w.data + p * w.stride + b * kDecodedInt8;
      for (int group = 0; group < 4; ++group) weights[p][group] = _mm512_loadu_si512(dense + 32 * group);
      scale[p] = _mm512_loadu_ps(dense + 128);
    }
    for (int t = 0; t < x.count; ++t, line += kInt8Line) {
      add_int8(weights[0], scale[0], line, b, sums + t * kTileRows);
      if (w.panels == 2) add_int8(weights[1], scale[1], line, b, sums + t * kTileRows + kPanel);
    }
  }
}

}  // namespace
}  // namespace moestro

// AVX2: products of 4-bit codes in integers, over the dot products of avx2_dots.h.
//
// e2m1 doubled is an integer of at most 12. Two columns of 16-bit tokens times 16-bit weights are summed by one instruction
// (vpmaddwd), four of 8-bit ones by two (vpmaddubsw, whose first operand is unsigned: weights are kept as 12 + 2 e2m1);
// integers are exact over a block of 16 columns, where the sum meets the block's scale. Kept 256 times too large in int16,
// a weight is a byte of a table look-up (vpshufb) where it lies, without extending its sign: 32 codes become words by
// 4 operations, and |sum| <= 16 * 2^15 * 12 * 256 < 2^31. So a token's sums are the same bits however it is multiplied.
#pragma once
#include "avx2.h"
#include "avx2_dots.h"

namespace moestro {
namespace {

inline __m256i broadcast32(const void* at) {
  int32_t bits;
  std::memcpy(&bits, at, 4);
  return _mm256_set1_epi32(bits);
}

inline __m256 broadcast_float(const void* at) { return _mm256_broadcast_ss(static_cast<const float*>(at)); }

// Nibbles of 32 bytes, the low (plane 0) or high ones, to bytes of a table.
inline __m256i look_up(__m256i table, __m256i line, int plane) {
  const __m256i nibbles = plane ? _mm256_srli_epi16(line, 4) : line;
  return _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}

// What both widths of integers have to say: of a block, four groups of columns by half and plane.
struct Int16 {
  static constexpr int kLine = kInt16Line, kWords = 2;  // registers of eight rows that a group of 32 codes becomes
  static constexpr int kDecoded = kBlock * kPanel + 2 * kPanel;  // uint16 of a block: words, and scales in float32

  static __m256i table() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  }
  static void words(__m256i bytes, __m256i* w) {  // columns (0, 1) and (4, 5) of plane 0, (2, 3) and (6, 7) of 1
    w[0] = _mm256_slli_epi16(bytes, 8);
    w[1] = _mm256_and_si256(bytes, _mm256_set1_epi16(static_cast<int16_t>(0xFF00u)));
  }
  static const uint16_t* at(const uint16_t* line, int b) { return line + b % 2 * kBlock; }  // of a block
  using Pair = __m256i;
  using Sum = __m256i;
  static Pair token(const uint16_t* at, int half, int plane, int word) {
    return broadcast32(at + 8 * half + 2 * plane + 4 * word);
  }
  static __m256i first(__m256i w, __m256i x) { return dot16(w, x); }
  static __m256i add(__m256i sum, __m256i w, __m256i x) { return dot16(sum, w, x); }
  struct Facts {  // of a token in a block
    __m256 unit;
  };
  static Facts facts(const uint16_t* line, int b) { return {broadcast_float(line + kChunk + b % 2 * 2)}; }
  static __m256 value(__m256i sum, const Facts& of) { return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), of.unit); }
};

struct Int8 {
  static constexpr int kLine = kInt8Line, kWords = 1;
  static constexpr int kDecoded = kBlock * kPanel / 2 + 2 * kPanel;

  static __m256i table() {
    return _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  }
  static void words(__m256i bytes, __m256i* w) { w[0] = bytes; }
  static const uint16_t* at(const uint16_t* line, int b) { return line + b % 2 * kBlock / 2; }
  using Pair = __m256i;
  using Sum = __m256i;
  static Pair token(const uint16_t* at, int half, int plane, int) { return broadcast32(at + 4 * half + 2 * plane); }
  static __m256i first(__m256i w, __m256i x) { return dot8(w, x); }
  static __m256i add(__m256i sum, __m256i w, __m256i x) { return dot8(sum, w, x); }
  struct Facts {
    __m256 unit, offset;
  };
  static Facts facts(const uint16_t* line, int b) {
    return {broadcast_float(line + kChunk / 2), broadcast_float(line + kChunk / 2 + 2 + b % 2 * 2)};
  }
  static __m256 value(__m256i sum, const Facts& of) {
    return _mm256_fmsub_ps(_mm256_cvtepi32_ps(sum8(sum)), of.unit, of.offset);
  }
};

// int16 in two planes of bytes, for few tokens: weights are bytes as the look-up made them, 28 operations of vectors for 16
// rows by 16 columns instead of 44, and a token takes 40 instead of 36. The sums are the same integers. A line is, for each
// 8 columns in the order of fp4 codes, 8 bytes of the upper plane (256 times them) and 8 of the lower (-128 .. 127); then,
// of each half, what a unit is worth, and 12 times the sum in it.
struct Split16 {
  static constexpr int kLine = 40, kWords = 1, kMost = kSplitMost;

  static __m256i table() { return Int8::table(); }
  static void words(__m256i bytes, __m256i* w) { w[0] = bytes; }
  static const uint16_t* at(const uint16_t* line, int b) { return line + b % 2 * kBlock; }
  struct Pair {
    __m256i high, low;
  };
  using Sum = Pair;
  static Pair token(const uint16_t* at, int half, int plane, int) {
    at += 8 * half + 2 * plane;
    return {broadcast32(at), broadcast32(at + 4)};
  }
  static Sum first(__m256i w, Pair x) { return {dot8(w, x.high), dot8(w, x.low)}; }
  static Sum add(Sum sum, __m256i w, Pair x) { return {dot8(sum.high, w, x.high), dot8(sum.low, w, x.low)}; }
  using Facts = Int8::Facts;
  static Facts facts(const uint16_t* line, int b) {
    line += kChunk + b % 2 * 4;
    return {broadcast_float(line), broadcast_float(line + 2)};
  }
  static __m256 value(const Sum& sum, const Facts& of) {
    return _mm256_fmsub_ps(_mm256_cvtepi32_ps(join8(sum.high, sum.low)), of.unit, of.offset);
  }
};

inline int32_t total(__m256i values) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// Lines of int16 to lines of Split16.
void split16(const Tokens& x, int blocks, uint16_t* to) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  for (int chunk = 0; chunk < (blocks + 1) / 2; ++chunk)
    for (int t = 0; t < x.count; ++t, to += Split16::kLine) {
      const uint16_t* line = x.data + chunk * x.stride + t * Int16::kLine;
      for (int b = 0; b < 2; ++b) {
        const __m256i words = load(line + b * kBlock);
        const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(128)), 8);
        const __m256i low = _mm256_sub_epi16(words, _mm256_slli_epi16(high, 8));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + b * kBlock),
                            _mm256_shuffle_epi8(_mm256_packs_epi16(high, low), order));
        float facts[2];
        std::memcpy(facts, line + kChunk + 2 * b, 4);
        facts[0] *= 256.f;  // weights are not 256 times too large here
        facts[1] = 12.f * static_cast<float>(total(_mm256_madd_epi16(words, _mm256_set1_epi16(1)))) * facts[0];
        std::memcpy(to + kChunk + 4 * b, facts, 8);
      }
    }
}

template <class Int>
MOESTRO_INLINE void add_block(const typename Int::Sum* sum, const typename Int::Facts& of, const __m256* scale, __m256* total) {
#pragma GCC unroll 2
  for (int rows = 0; rows < 2; ++rows)
    total[rows] = _mm256_fmadd_ps(Int::value(sum[rows], of), scale[rows], total[rows]);
}

// The sums of T tokens are kept here, mostly in memory: GCC stored those it was given a second time in each block.
template <int T>
struct Totals {
  __m256 of[T][2];

  explicit Totals(const float* sums) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      of[t][0] = _mm256_loadu_ps(sums + t * kTileRows);
      of[t][1] = _mm256_loadu_ps(sums + t * kTileRows + 8);
    }
  }
  void store(float* sums) const {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      _mm256_storeu_ps(sums + t * kTileRows, of[t][0]);
      _mm256_storeu_ps(sums + t * kTileRows + 8, of[t][1]);
    }
  }
};

// total += a block of a panel, decoded in registers, by T tokens; `line` is of the block's 32 columns, `b` its half.
template <class Int, int T, bool kMx>
MOESTRO_INLINE void direct_block(const uint8_t* codes, const uint8_t* scales, const uint16_t* line, int b,
                                 __m256 (*total)[2]) {
  const __m256i table = Int::table();
  typename Int::Sum sum[T][2];
#pragma GCC unroll 4
  for (int group = 0; group < 4; ++group) {
    const int half = group / 2, plane = group % 2;
    __m256i w[2][2];
#pragma GCC unroll 2
    for (int rows = 0; rows < 2; ++rows)
      Int::words(look_up(table, load(codes + 64 * half + 32 * rows), plane), w[rows]);
#pragma GCC unroll 2
    for (int word = 0; word < Int::kWords; ++word)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const typename Int::Pair pair = Int::token(Int::at(line + t * Int::kLine, b), half, plane, word);
#pragma GCC unroll 2
        for (int rows = 0; rows < 2; ++rows)
          sum[t][rows] = group + word ? Int::add(sum[t][rows], w[rows][word], pair) : Int::first(w[rows][word], pair);
      }
  }
  const __m256 scale[2] = {block_scales(scales, kMx), block_scales(scales + 8, kMx)};
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) add_block<Int>(sum[t], Int::facts(line + t * Int::kLine, b), scale, total[t]);
}

// One panel by T tokens, asked for 6 KiB ahead: 4 KiB were 4 to 5 % slower with 1 to 8 tokens, 8 KiB 2 to 4 %. Two blocks a
// round, with every address a pointer that moves: addresses worked out from the block's number took 55 of 150 instructions.
template <class Int, int T, bool kMx>
inline void direct_panel(const Codes& from, int panel, int blocks, const Tokens& x, float* sums) {
  const uint8_t *codes = from.codes + panel * from.code_stride, *scales = from.scales + panel * from.scale_stride;
  StreamAhead ask(from, panel, blocks, 48);
  const uint16_t* line = x.data;
  const int64_t stride = x.stride;
  Totals<T> total(sums);
  for (int b = 0; b < blocks; b += 2, line += stride) {
    ask.two_blocks(b);
    direct_block<Int, T, kMx>(codes, scales, line, 0, total.of);
    if (b + 1 < blocks)
      direct_block<Int, T, kMx>(codes + kCodeBytes, kMx ? scales : scales + kPanel, line, 1, total.of);
    codes += 2 * kCodeBytes;
    scales += kMx ? kPanel : 2 * kPanel;
  }
  total.store(sums);
}

template <class Int, int T>
inline void direct_tokens(const Codes& from, int panel, int blocks, const Tokens& x, float* sums) {
  if (from.mx)
    direct_panel<Int, T, true>(from, panel, blocks, x, sums);
  else
    direct_panel<Int, T, false>(from, panel, blocks, x, sums);
}

template <class Int>
void direct(const Codes& from, int blocks, const Tokens& x, float* sums) {
  for (int p = 0; p < from.panels; ++p)
    for (int t = 0; t < x.count; t += 4) {
      const Tokens part{x.data + t * Int::kLine, x.stride, x.count - t};
      float* to = sums + t * kTileRows + p * kPanel;
      switch (part.count) {
        case 1: direct_tokens<Int, 1>(from, p, blocks, part, to); break;
        case 2: direct_tokens<Int, 2>(from, p, blocks, part, to); break;
        case 3: direct_tokens<Int, 3>(from, p, blocks, part, to); break;
        default: direct_tokens<Int, 4>(from, p, blocks, part, to); break;
      }
    }
}

// Blocks of [4 groups * words, 16 rows] registers of 4 bytes a row, then the scales of 16 rows.
template <class Int, bool kMx>
inline void decode_panel(const uint8_t* codes, const uint8_t* scales, int blocks, uint16_t* dense) {
  const __m256i table = Int::table();
  for (int b = 0; b < blocks; ++b, codes += kCodeBytes, dense += Int::kDecoded) {
    auto* to = reinterpret_cast<__m256i*>(dense);
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group)
#pragma GCC unroll 2
      for (int rows = 0; rows < 2; ++rows) {
        __m256i w[2];
        Int::words(look_up(table, load(codes + group / 2 * 64 + 32 * rows), group % 2), w);
#pragma GCC unroll 2
        for (int word = 0; word < Int::kWords; ++word)
          _mm256_storeu_si256(to + 2 * (Int::kWords * group + word) + rows, w[word]);
      }
    auto* factors = reinterpret_cast<float*>(dense + Int::kDecoded) - kPanel;
    _mm256_storeu_ps(factors, block_scales(scales, kMx));
    _mm256_storeu_ps(factors + 8, block_scales(scales + 8, kMx));
    if (!kMx || b % 2) scales += kPanel;
  }
}

template <class Int>
void decode_integers(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p, dense += blocks * Int::kDecoded) {
    const uint8_t *codes = from.codes + p * from.code_stride, *scales = from.scales + p * from.scale_stride;
    if (from.mx)
      decode_panel<Int, true>(codes, scales, blocks, dense);
    else
      decode_panel<Int, false>(codes, scales, blocks, dense);
  }
}

// total += a decoded block, times T tokens of half b of a line.
template <class Int, int T>
MOESTRO_INLINE void multiply_block(const uint16_t* dense, const uint16_t* line, int b, __m256 (*total)[2]) {
  __m256i sum[T][2];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * Int::kWords; ++i) {
    const int group = i / Int::kWords;
    const __m256i first = load(dense + 32 * i), second = load(dense + 32 * i + 16);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256i pair = Int::token(Int::at(line + t * Int::kLine, b), group / 2, group % 2, i % Int::kWords);
      sum[t][0] = i ? Int::add(sum[t][0], first, pair) : Int::first(first, pair);
      sum[t][1] = i ? Int::add(sum[t][1], second, pair) : Int::first(second, pair);
    }
  }
  const auto* scales = reinterpret_cast<const float*>(dense + Int::kDecoded) - kPanel;
  const __m256 scale[2] = {_mm256_loadu_ps(scales), _mm256_loadu_ps(scales + 8)};
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) add_block<Int>(sum[t], Int::facts(line + t * Int::kLine, b), scale, total[t]);
}

template <class Int, int T>
inline void multiply_integers(const uint16_t* dense, int blocks, const Tokens& x, float* sums, Ahead& ahead, int ask) {
  Totals<T> total(sums);
  const uint16_t* line = x.data;
  const int64_t stride = x.stride;
  for (int b = 0; b < blocks; b += 2, line += stride, dense += 2 * Int::kDecoded) {
    ahead.ask(ask);
    multiply_block<Int, T>(dense, line, 0, total.of);
    if (b + 1 < blocks) multiply_block<Int, T>(dense + Int::kDecoded, line, 1, total.of);
  }
  total.store(sums);
}

template <class Int>
struct Tiles {
  template <int T>
  struct Of {
    static void run(const uint16_t* line, int blocks, const Tokens& x, float* sums, Ahead& ahead, int ask) {
      multiply_integers<Int, T>(line, blocks, x, sums, ahead, ask);
    }
  };
};

// Sums of six tokens left no register for their totals: 74 % of the rate of vpmaddwd, four 77 %, three and three 79 %, but
// five at once 76 % and three and two 70 %.
template <class Int>
void multiply_tokens(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  each_tile<Tiles<Int>::template Of, 4, 5>(w, blocks, x, Int::kLine, sums, ahead);
}

}  // namespace
}  // namespace moestro

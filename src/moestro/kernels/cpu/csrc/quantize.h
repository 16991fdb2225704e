// Tokens in the forms of AVX2 and of int8: lines of float32, and integers with a scale per 16 or 32 columns.
//
// int16: the scale is a power of two that brings the largest of 16 columns into [2^14, 2^15), but for one with all bits set,
// which would need 128 in its upper byte: that is brought below 2^14. So every bf16 value within 2^-7 of the largest is exact
// (2^-6 below such a one) and smaller ones lose at most 2^-16 (2^-15) of the largest. int8: symmetric, amax / 127 per 32
// columns, to nearest, ties to even. A block that holds infinity or NaN has the scale NaN: nothing vanishes.
// Plain loops that the compiler vectorises for the instruction set of the file which includes this.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace moestro {
namespace {

constexpr int kFloatLine = line_of(Form::kFloat), kInt16Line = line_of(Form::kInt16), kInt8Line = line_of(Form::kInt8);

template <int Count>
inline uint32_t largest_bits(const float* values) {  // of the magnitudes; at least 0x7F800000 if one is not finite
  int32_t most = 0;
  for (int i = 0; i < Count; ++i) {
    const auto size = static_cast<int32_t>(bits_of(values[i]) & 0x7FFFFFFFu);
    most = most > size ? most : size;
  }
  return static_cast<uint32_t>(most);
}

constexpr uint32_t kNotFinite = 0x7F800000u;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits

#if defined(__AVX2__)
// GCC's code for the loops below took 55 cycles for 16 values, a twentieth of a layer of 256 tokens.
inline int32_t largest_of(__m256i sizes) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1)));
}

inline uint32_t largest_of_16(const float* values) {
  const __m256i size = _mm256_set1_epi32(0x7FFFFFFF);
  const auto* at = reinterpret_cast<const __m256i*>(values);
  return static_cast<uint32_t>(largest_of(_mm256_max_epi32(_mm256_and_si256(_mm256_loadu_si256(at), size),
                                                           _mm256_and_si256(_mm256_loadu_si256(at + 1), size))));
}

inline void round_to_int16(const float* values, float to_integer, uint16_t* to) {  // exact: powers of two, bf16 values
  const __m256 factor = _mm256_set1_ps(to_integer);
  const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), factor));
  const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + 8), factor));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8));
}
#else
inline uint32_t largest_of_16(const float* values) { return largest_bits<kPanel>(values); }

inline void round_to_int16(const float* values, float to_integer, uint16_t* to) {
  for (int i = 0; i < kPanel; ++i)
    to[i] = static_cast<uint16_t>(bits_of(values[i] * to_integer + kRound) - bits_of(kRound));
}
#endif

inline void put_int16(const float* values, int half, uint16_t* line) {  // 16 values, which bf16 holds
  const uint32_t most = largest_of_16(values), up = most + 0x10000u;
  const uint32_t exponent = up >> 23 < 24 ? 24 : up >> 23;  // below 2^-103: as if it were that large
  const float unit = most >= kNotFinite ? float_of(0x7FC00000u) : float_of((exponent - 14 - 9) << 23);
  if (most < kNotFinite)
    round_to_int16(values, float_of((127 + 127 + 14 - exponent) << 23), line + half * kPanel);
  else
    std::memset(line + half * kPanel, 0, 2 * kPanel);
  std::memcpy(line + kChunk + 2 * half, &unit, 4);
}

// The order of fp4 codes' bytes (see moestro_cpu.h): of 8 columns 0 4 1 5, 2 6 3 7.
constexpr int kByteColumn[8] = {0, 4, 1, 5, 2, 6, 3, 7};

inline void put_int8(const float* values, uint16_t* line) {  // 32 values
  const uint32_t most = largest_bits<kChunk>(values);
  const bool finite = most < kNotFinite;
  const float least = 0x1p-126f, share = float_of(finite ? most : 0u) / 127.f;
  const float scale = !finite ? float_of(0x7FC00000u) : most == 0 ? 1.f : share < least ? least : share;
  alignas(64) int32_t q[kChunk];
  for (int i = 0; i < kChunk; ++i) {
    const float value = finite ? values[i] / scale : 0.f;
    q[i] = static_cast<int32_t>(bits_of(value + kRound) - bits_of(kRound));
  }
  auto* bytes = reinterpret_cast<int8_t*>(line);
  for (int i = 0; i < kChunk; ++i) bytes[i] = static_cast<int8_t>(q[i / 8 * 8 + kByteColumn[i % 8]]);
  float facts[4] = {scale * .5f, 0.f, 0.f, 0.f};
  for (int half = 0; half < 2; ++half) {
    int32_t sum = 0;
    for (int i = 0; i < kPanel; ++i) sum += q[half * kPanel + i];
    facts[1 + half] = 12.f * static_cast<float>(sum) * facts[0];
  }
  std::memcpy(line + kChunk / 2, facts, sizeof facts);
}

// 16 values of the intermediate, rounded to bf16 where x is: a float16's range would lose those beyond 65504.
inline void round_to(int type, const float* from, float* to) {
  if (type != MOESTRO_X_BF16) {
    for (int i = 0; i < kPanel; ++i) to[i] = from[i];
  } else {
    for (int i = 0; i < kPanel; ++i) to[i] = float_of(static_cast<uint32_t>(round_bf16(from[i])) << 16);
  }
}

struct FloatLine {
  static int size(int) { return kFloatLine; }
  static void put(int type, const float* a, int half, uint16_t* to) {
    round_to(type, a, reinterpret_cast<float*>(to) + half * kPanel);
  }
};

struct ExactFloatLine {  // what is quantised next is not rounded first
  static int size(int) { return kFloatLine; }
  static void put(int, const float* a, int half, uint16_t* to) {
    std::memcpy(reinterpret_cast<float*>(to) + half * kPanel, a, sizeof(float) * kPanel);
  }
};

struct Int16Line {
  static int size(int) { return kInt16Line; }
  static void put(int type, const float* a, int half, uint16_t* to) {
    alignas(64) float rounded[kPanel];
    round_to(type, a, rounded);
    put_int16(rounded, half, to);
  }
};

inline void load_values(int type, const void* row, int64_t column, float* to) {  // 16 of x
  const auto* halves = static_cast<const uint16_t*>(row) + column;
  if (type == MOESTRO_X_FP32) {
    std::memcpy(to, static_cast<const float*>(row) + column, sizeof(float) * kPanel);
  } else if (type == MOESTRO_X_FP16) {
    load_half(halves, to);
  } else {
    for (int i = 0; i < kPanel; ++i) to[i] = float_of(static_cast<uint32_t>(halves[i]) << 16);
  }
}

// A row of x, [columns], to its lines: put(values of 32 columns, line); chunks are `stride` elements apart.
template <void (*Put)(const float*, uint16_t*)>
void gather_lines(int type, const void* row, int64_t columns, uint16_t* to, int64_t stride) {
  alignas(64) float values[kChunk];
  for (int64_t c = 0; c < columns; c += kChunk, to += stride) {
    load_values(type, row, c, values);
    if (c + kPanel < columns)
      load_values(type, row, c + kPanel, values + kPanel);
    else
      std::memset(values + kPanel, 0, sizeof(float) * kPanel);
    Put(values, to);
  }
}

inline void float_chunk(const float* values, uint16_t* line) { std::memcpy(line, values, sizeof(float) * kChunk); }
inline void int16_chunk(const float* values, uint16_t* line) {
  put_int16(values, 0, line);
  put_int16(values + kPanel, 1, line);
}

inline void quantize_int8(const uint16_t* lines, int tokens, uint16_t* to) {
  for (int t = 0; t < tokens; ++t, lines += kFloatLine, to += kInt8Line)
    put_int8(reinterpret_cast<const float*>(lines), to);
}

}  // namespace
}  // namespace moestro

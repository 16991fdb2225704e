// Activations in their own type and as the products take them: bf16 lines, in as many parts as keep every bit.
//
// Weights are exact in bf16 and products are summed in float32, so a float16 x is two bf16 numbers and a float32 x three
// (8 bits each, cut off, none lost): a token of theirs is two or three lines, whose sums are added before the activation.
// Plain loops over 16 lanes, static in each file that includes this, for its instruction set.
#pragma once
#include <cstring>
#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace moestro {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t round_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(value), nan = (bits & 0x7FFFFFFFu) > 0x7F800000u ? ~0u : 0u;
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  return static_cast<uint16_t>(((nan & 0x7FC00000u) | (~nan & rounded)) >> 16);
}

// 16 lanes. GCC keeps the loop scalar, which took 8 of 10 cycles of an activation; AVX-512 has an instruction.
inline void store_bf16(const float* from, uint16_t* to) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
#else
  for (int i = 0; i < kPanel; ++i) to[i] = round_bf16(from[i]);
#endif
}

#if !defined(__F16C__)
inline float widen_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  return float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t round_half(float value) {  // to nearest, ties to even
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  uint32_t half = (size + 0xC8000FFFu + (size >> 13 & 1u)) >> 13;
  if (size < 0x38800000u) half = bits_of(float_of(size) + .5f) - 0x3F000000u;  // subnormal: the addition rounds
  if (size >= 0x477FF000u) half = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(sign | half);
}
#endif

inline void load_half(const uint16_t* from, float* to) {  // 16 lanes
#if defined(__F16C__)
  for (int i = 0; i < kPanel; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
  for (int i = 0; i < kPanel; ++i) to[i] = widen_half(from[i]);
#endif
}

inline void store_half(const float* from, uint16_t* to) {
#if defined(__F16C__)
  for (int i = 0; i < kPanel; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kPanel; ++i) to[i] = round_half(from[i]);
#endif
}

// 16 values to `parts` lines, 8 bits each; infinity and NaN are whole in the first.
inline void split(const float* from, int parts, uint16_t* to) {
  alignas(64) float left[kPanel];
  for (int i = 0; i < kPanel; ++i) left[i] = from[i];
  for (int p = 0; p < parts; ++p, to += kChunk)
    for (int i = 0; i < kPanel; ++i) {
      const uint32_t bits = bits_of(left[i]), finite = (bits & 0x7F800000u) != 0x7F800000u ? ~0u : 0u;
      const uint32_t high = finite ? bits & 0xFFFF0000u : (bits & 0xFFFF0000u) | (bits & 0xFFFFu ? 0x400000u : 0u);
      to[i] = static_cast<uint16_t>(high >> 16);
      left[i] = float_of(bits_of(left[i] - float_of(high)) & finite);
    }
}

// 16 values of the intermediate to a half of their lines: rounded to bf16 where x is bf16; else as many bits as x has, with
// the range of float32, since a float16 x may have an intermediate beyond 65504 whose result is not.
struct Bf16Line {
  static int size(int type) { return parts_of(type) * kChunk; }
  static void put(int type, const float* a, int half, uint16_t* to) {
    to += half * kPanel;
    if (type == MOESTRO_X_BF16) return store_bf16(a, to);
    split(a, parts_of(type), to);
  }
};

// A row of x, [columns], to its bf16 lines; chunks are `stride` elements apart, and a half chunk at the end is padded with 0.
inline void gather(int type, const void* row, int64_t columns, uint16_t* to, int64_t stride) {
  const int parts = parts_of(type);
  const auto* halves = static_cast<const uint16_t*>(row);
  alignas(64) float values[kPanel];
  for (int64_t c = 0; c < columns; c += kPanel) {
    uint16_t* line = to + c / kChunk * stride + c % kChunk;
    if (type == MOESTRO_X_BF16) {
      std::memcpy(line, halves + c, 2 * kPanel);
    } else {
      if (type == MOESTRO_X_FP16) load_half(halves + c, values);
      split(type == MOESTRO_X_FP16 ? values : static_cast<const float*>(row) + c, parts, line);
    }
  }
  if (columns % kChunk)
    for (int p = 0; p < parts; ++p)
      std::memset(to + columns / kChunk * stride + p * kChunk + kPanel, 0, 2 * kPanel);
}

void store_result(int type, const float* from, void* to, int64_t count) {  // count: a multiple of 16
  auto* halves = static_cast<uint16_t*>(to);
  if (type == MOESTRO_X_FP32) std::memcpy(to, from, sizeof(float) * count);
  if (type == MOESTRO_X_BF16)
    for (int64_t i = 0; i < count; i += kPanel) store_bf16(from + i, halves + i);
  if (type == MOESTRO_X_FP16)
    for (int64_t i = 0; i < count; i += kPanel) store_half(from + i, halves + i);
}

}  // namespace
}  // namespace moestro

// Dot products of integers in 256 bits: one instruction with AVX-VNNI, two or three without. Results are the same bits.
#pragma once
#include <immintrin.h>

namespace moestro {
namespace {

#if defined(__AVXVNNI__)
constexpr int kSplitMost = 2;  // tokens that are multiplied in two planes of bytes (see Split16)
inline __m256i dot16(__m256i sum, __m256i w, __m256i x) { return _mm256_dpwssd_avx_epi32(sum, w, x); }
inline __m256i dot16(__m256i w, __m256i x) { return _mm256_madd_epi16(w, x); }
inline __m256i dot8(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline __m256i dot8(__m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x); }
inline __m256i sum8(__m256i sum) { return sum; }
inline __m256i join8(__m256i high, __m256i low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
#else
constexpr int kSplitMost = 3;
inline __m256i dot16(__m256i w, __m256i x) { return _mm256_madd_epi16(w, x); }
// GCC reorders additions of integers over a whole block, and then has no registers for the products: 64 spills in 84
// additions, half the speed. It cannot look into an empty statement.
inline __m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}
inline __m256i dot16(__m256i sum, __m256i w, __m256i x) { return in_order(_mm256_add_epi32(sum, dot16(w, x))); }
// Sums of two columns in 16 bits, up to four of them: at most 4 * 2 * 24 * 127 = 24384.
inline __m256i dot8(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
inline __m256i dot8(__m256i sum, __m256i w, __m256i x) { return in_order(_mm256_add_epi16(sum, dot8(w, x))); }
inline __m256i sum8(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
inline __m256i join8(__m256i high, __m256i low) {  // 256 times a sum of high bytes, and one of low bytes
  return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)), sum8(low));
}
#endif

}  // namespace
}  // namespace moestro

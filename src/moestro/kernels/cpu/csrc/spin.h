// The rate of an arithmetic: registers only, as many independent sums as hide the instructions' latency.
#pragma once
#include <immintrin.h>

#include "avx2_dots.h"
#include "kernels.h"
#include "spin_loop.h"

namespace moestro {
namespace {

struct Float256 {
  using Register = __m256;
  static constexpr int64_t kOperations = 2 * 8;  // multiplications and additions of one step of one sum
  static Register zero() { return _mm256_setzero_ps(); }
  static Register step(Register sum, Register a, Register b) { return _mm256_fmadd_ps(a, b, sum); }
};

struct Words256 {
  using Register = __m256i;
  static constexpr int64_t kOperations = 2 * 16;
  static Register zero() { return _mm256_setzero_si256(); }
  static Register step(Register sum, Register a, Register b) { return dot16(sum, a, b); }
};

struct Bytes256 {
  using Register = __m256i;
  static constexpr int64_t kOperations = 2 * 32;
  static Register zero() { return _mm256_setzero_si256(); }
  static Register step(Register sum, Register a, Register b) { return dot8(sum, a, b); }
};

template <class Arithmetic>
int64_t spin(int64_t rounds) {
  return spin_sums<Arithmetic, 12>(rounds);
}

}  // namespace
}  // namespace moestro

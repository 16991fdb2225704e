// The loop that a rate is measured with: registers only, as many independent sums as hide the instructions' latency.
#pragma once
#include <cstdint>

#ifdef __aarch64__
#define MOESTRO_VECTOR "w"  // the compiler's letter for a vector register
#else
#define MOESTRO_VECTOR "v"
#endif

namespace moestro {
namespace {

// Operations of `rounds` rounds. kSums and what they are made of fill the registers.
template <class Arithmetic, int kSums>
int64_t spin_sums(int64_t rounds) {
  constexpr int kSteps = 8;
  typename Arithmetic::Register sum[kSums], a = Arithmetic::zero(), b = Arithmetic::zero();
  for (auto& one : sum) one = Arithmetic::zero();
  __asm__ volatile("" : "+" MOESTRO_VECTOR(b));
  for (int64_t i = 0; i < rounds; ++i) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 20
      for (int s = 0; s < kSums; ++s) {
        sum[s] = Arithmetic::step(sum[s], a, b);
        __asm__ volatile("" : "+" MOESTRO_VECTOR(a));  // not known to be the same as before: no product serves two sums
      }
    }
  }
  for (auto& one : sum) __asm__ volatile("" : : MOESTRO_VECTOR(one));
  return rounds * kSteps * kSums * Arithmetic::kOperations;
}

}  // namespace
}  // namespace moestro

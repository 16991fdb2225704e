// The rate of an arithmetic on NEON: registers only, as many independent sums as hide the instructions' latency.
#pragma once
#include <arm_neon.h>

#include "kernels.h"
#include "neon_dots.h"
#include "spin_loop.h"

namespace moestro {
namespace {

struct Floats {
  using Register = float32x4_t;
  static constexpr int64_t kOperations = 2 * 4;  // multiplications and additions of one step of one sum
  static Register zero() { return vdupq_n_f32(0.f); }
  static Register step(Register sum, Register a, Register b) { return vfmaq_f32(sum, a, b); }
};

struct Int8s {
  using Register = int32x4_t;
  static constexpr int64_t kOperations = 2 * 16;
  static Register zero() { return vdupq_n_s32(0); }
  static Register step(Register sum, Register a, Register b) {
    return dot8<0>(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};

struct Int16s {  // in two planes of bytes
  using Register = int32x4_t;
  static constexpr int64_t kOperations = 2 * 16;
  static Register zero() { return vdupq_n_s32(0); }
  static Register step(Register sum, Register a, Register b) { return Int8s::step(Int8s::step(sum, a, b), a, b); }
};

template <class Arithmetic>
int64_t spin(int64_t rounds) {
  return spin_sums<Arithmetic, 20>(rounds);
}

}  // namespace
}  // namespace moestro

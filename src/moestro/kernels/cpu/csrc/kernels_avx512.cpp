// AVX-512 with dot products of bf16 and int8 (Zen 4 and newer, Cooper Lake, Sapphire Rapids and newer).
#include "kernels_avx512_tables.h"
#include "spin.h"

namespace moestro {
namespace {

struct Float512 {
  using Register = __m512;
  static constexpr int64_t kOperations = 2 * 16;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register step(Register sum, Register a, Register b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Bf16s {
  using Register = __m512;
  static constexpr int64_t kOperations = 2 * 32;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register step(Register sum, Register a, Register b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

struct Bytes512 {
  using Register = __m512i;
  static constexpr int64_t kOperations = 2 * 64;
  static Register zero() { return _mm512_setzero_si512(); }
  static Register step(Register sum, Register a, Register b) { return _mm512_dpbusd_epi32(sum, a, b); }
};

}  // namespace

const Kernels* kernels_avx512(const MoestroLayer& layer) {
  if (layer.input_format == MOESTRO_INPUT_INT8) return &kInt8;
  return layer.batch_invariant ? invariant(layer) : &kBf16;
}

int64_t spin_avx512(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Float512>(rounds);
    case MOESTRO_DOT_BF16: return spin<Bf16s>(rounds);
    case MOESTRO_DOT_INT8: return spin<Bytes512>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

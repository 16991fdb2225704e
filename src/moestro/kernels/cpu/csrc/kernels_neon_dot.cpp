// NEON with dot products of bytes (dotprod: Cortex-A55, A75, Neoverse, Apple, and newer).
#include "kernels_neon_tables.h"
#include "spin_neon.h"

namespace moestro {

const Kernels* kernels_neon_dot(const MoestroLayer& layer) {
  if (layer.input_format == MOESTRO_INPUT_INT8) return &kInt8;
  return is_fp4(layer.format) && layer.x_type == MOESTRO_X_BF16 ? &kInt16 : &kFloat;
}

int64_t spin_neon_dot(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Floats>(rounds);
    case MOESTRO_DOT_INT16: return spin<Int16s>(rounds);
    case MOESTRO_DOT_INT8: return spin<Int8s>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

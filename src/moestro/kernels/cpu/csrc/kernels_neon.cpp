// NEON alone: every 64-bit ARM. Without dot products integers multiply no faster than floats, so 4-bit weights do in floats.
#include "kernels_neon_tables.h"
#include "spin_neon.h"

namespace moestro {

const Kernels* kernels_neon(const MoestroLayer& layer) {
  return layer.input_format == MOESTRO_INPUT_INT8 ? &kInt8 : &kFloat;
}

int64_t spin_neon(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Floats>(rounds);
    case MOESTRO_DOT_INT8: return spin<Int8s>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

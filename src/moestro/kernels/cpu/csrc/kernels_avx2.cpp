// AVX2 with FMA and F16C (Haswell and Zen, and newer).
#include "kernels_avx2_tables.h"
#include "spin.h"

namespace moestro {

const Kernels* kernels_avx2(const MoestroLayer& layer) { return choose(layer); }

int64_t spin_avx2(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Float256>(rounds);
    case MOESTRO_DOT_INT16: return spin<Words256>(rounds);
    case MOESTRO_DOT_INT8: return spin<Bytes256>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

// AVX2 with integer dot products of AVX-VNNI (Alder Lake, Zen 5, and newer).
#include "kernels_avx2_tables.h"
#include "spin.h"

namespace moestro {

const Kernels* kernels_avx_vnni(const MoestroLayer& layer) { return choose(layer); }

int64_t spin_avx_vnni(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Float256>(rounds);
    case MOESTRO_DOT_INT16: return spin<Words256>(rounds);
    case MOESTRO_DOT_INT8: return spin<Bytes256>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

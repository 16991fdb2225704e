// The AMX path with emulated tiles; only chosen by force.
#include "tiles_emulated.h"

#include "amx.h"
#include "plain.h"

namespace moestro {
namespace {

constexpr Kernels kTiles{.decode = decode,
                         .decode_fp8 = decode_fp8,
                         .multiply = multiply_tiles<multiply>,
                         .activate_gated = activate_gated<Bf16Line>,
                         .activate = activate<Bf16Line>,
                         .combine = combine,
                         .gather = gather,
                         .store_result = store_result,
                         .enter = configure_tiles,
                         .leave = release_tiles};

}  // namespace

const Kernels* kernels_amx_emulated(const MoestroLayer& layer) {
  return layer.input_format == MOESTRO_INPUT_INT8 || layer.batch_invariant ? kernels_generic(layer) : &kTiles;
}

}  // namespace moestro

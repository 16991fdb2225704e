// The AMX path with emulated tiles; only chosen by force.
#include "tiles_emulated.h"

#include "amx.h"
#include "plain.h"

namespace moestro {
namespace {

constexpr Kernels kKernels{nullptr, decode, multiply_tiles<multiply>, activate_gated,
                           activate, combine, gather, store_result, configure_tiles, release_tiles};

}  // namespace

const Kernels* kernels_amx_emulated() { return &kKernels; }

}  // namespace moestro

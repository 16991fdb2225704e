// AMX bf16 (Sapphire Rapids and newer): tiles for products of bf16, AVX-512 for the rest.
#include "tiles_amx.h"

#include "amx.h"
#include "avx512.h"
#include "epilogue.h"

namespace moestro {
namespace {

constexpr Kernels kKernels{direct, decode, multiply_tiles<multiply>, activate_gated,
                           activate, combine, gather, store_result, configure_tiles, release_tiles};

}  // namespace

const Kernels* kernels_amx() { return &kKernels; }

}  // namespace moestro

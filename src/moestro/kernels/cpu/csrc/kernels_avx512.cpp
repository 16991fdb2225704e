// AVX-512 with bf16 dot products (Zen 4 and newer, Cooper Lake, Sapphire Rapids and newer).
#include "avx512.h"

#include "epilogue.h"

namespace moestro {
namespace {

constexpr Kernels kKernels{direct, decode, multiply, activate_gated,
                           activate, combine, gather, store_result, nullptr, nullptr};

}  // namespace

const Kernels* kernels_avx512() { return &kKernels; }

}  // namespace moestro

// Plain C++ for machines without a table of their own.
#include "plain.h"

namespace moestro {
namespace {

constexpr Kernels kKernels{nullptr, decode, multiply, activate_gated,
                           activate, combine, gather, store_result, nullptr, nullptr};

}  // namespace

const Kernels* kernels_generic() { return &kKernels; }

}  // namespace moestro

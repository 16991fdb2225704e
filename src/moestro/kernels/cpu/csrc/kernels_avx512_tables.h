// The tables of AVX-512, for the files that include this with its flags; AMX replaces a product.
#pragma once
#include "avx512.h"
#include "avx512_int4.h"
#include "avx512_int8.h"
#include "epilogue.h"

namespace moestro {
namespace {

constexpr Kernels bf16_table(void (*product)(const Dense&, int, const Tokens&, float*, Ahead&),
                             void (*in_registers)(const Codes&, int, const Tokens&, float*)) {
  return {.direct = in_registers,
          .decode = decode,
          .decode_fp8 = decode_fp8,
          .decode_int4 = decode_int4,
          .direct_int4 = in_registers == direct ? direct_int4 : nullptr,
          .multiply = product,
          .activate_gated = activate_gated<Bf16Line>,
          .activate = activate<Bf16Line>,
          .combine = combine,
          .gather = gather,
          .store_result = store_result};
}

constexpr Kernels kBf16 = bf16_table(multiply, direct), kInvariant = bf16_table(multiply, direct_scaled);

constexpr Kernels kInt8{.form = Form::kInt8,
                        .decoded_block = kDecodedInt8,
                        .direct = direct_int8,
                        .decode = decode_int8,
                        .multiply = multiply_int8,
                        .activate_gated = activate_gated<ExactFloatLine>,
                        .activate = activate<ExactFloatLine>,
                        .quantize = quantize_int8,
                        .combine = combine,
                        .gather = gather_lines<put_int8>,
                        .store_result = store_result};

}  // namespace
}  // namespace moestro

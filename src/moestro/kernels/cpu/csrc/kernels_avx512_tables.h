// The tables of AVX-512, for the files that include this with its flags; AMX replaces a product.
#pragma once
#include "avx512.h"
#include "avx512_blocks.h"
#include "avx512_int4.h"
#include "avx512_int8.h"
#include "epilogue.h"

namespace moestro {
namespace {

constexpr Kernels bf16_table(void (*product)(const Dense&, int, const Tokens&, float*, Ahead&)) {
  return {.direct = direct,
          .decode = decode,
          .decode_fp8 = decode_fp8,
          .decode_int4 = decode_int4,
          .direct_int4 = direct_int4,
          .multiply = product,
          .activate_gated = activate_gated<Bf16Line>,
          .activate = activate<Bf16Line>,
          .combine = combine,
          .gather = gather,
          .store_result = store_result};
}

constexpr Kernels blocks_table() {
  Kernels table = bf16_table(multiply_blocks);
  table.decoded_block = kBlockAndScales;
  table.decode = decode_blocks;
  return table;
}

constexpr Kernels panels_table() {
  Kernels table = bf16_table(multiply);
  table.direct_int4 = nullptr;
  return table;
}

constexpr Kernels kBf16 = bf16_table(multiply), kInvariantCodes = blocks_table(), kInvariantInt4 = panels_table();

// bf16 and FP8 have one path, which rounds the same for any number of tokens; INT4 takes the one of many tokens.
const Kernels* invariant(const MoestroLayer& layer) {
  if (is_fp4(layer.format)) return &kInvariantCodes;
  return layer.format == MOESTRO_INT4 ? &kInvariantInt4 : &kBf16;
}

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

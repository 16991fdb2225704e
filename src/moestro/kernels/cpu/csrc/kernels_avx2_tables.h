// The tables of AVX2, for the file that includes this with its instruction set's flags.
#pragma once
#include "avx2_integers.h"

namespace moestro {
namespace {

constexpr Kernels kFloat{.form = Form::kFloat,
                         .decode = decode,
                         .decode_fp8 = decode_fp8,
                         .decode_int4 = decode_int4,
                         .multiply = multiply,
                         .activate_gated = activate_gated<FloatLine>,
                         .activate = activate<FloatLine>,
                         .combine = combine,
                         .gather = gather_lines<float_chunk>,
                         .store_result = store_result};

constexpr Kernels kInt16{.form = Form::kInt16,
                         .decoded_block = Int16::kDecoded,
                         .direct = direct<Int16>,
                         .split_most = Split16::kMost,
                         .split_line = Split16::kLine,
                         .split = split16,
                         .direct_split = direct<Split16>,
                         .decode = decode_integers<Int16>,
                         .multiply = multiply_tokens<Int16>,
                         .activate_gated = activate_gated<Int16Line>,
                         .activate = activate<Int16Line>,
                         .combine = combine,
                         .gather = gather_lines<int16_chunk>,
                         .store_result = store_result};

constexpr Kernels kInt8{.form = Form::kInt8,
                        .decoded_block = Int8::kDecoded,
                        .direct = direct<Int8>,
                        .decode = decode_integers<Int8>,
                        .multiply = multiply_tokens<Int8>,
                        .activate_gated = activate_gated<ExactFloatLine>,
                        .activate = activate<ExactFloatLine>,
                        .quantize = quantize_int8,
                        .combine = combine,
                        .gather = gather_lines<put_int8>,
                        .store_result = store_result};

const Kernels* choose(const MoestroLayer& layer) {
  if (layer.input_format == MOESTRO_INPUT_INT8) return &kInt8;
  return is_fp4(layer.format) && layer.x_type == MOESTRO_X_BF16 ? &kInt16 : &kFloat;
}

}  // namespace
}  // namespace moestro

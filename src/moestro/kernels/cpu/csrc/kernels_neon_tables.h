// The tables of NEON, for the file that includes this with its instruction set's flags.
#pragma once
#include "neon_integers.h"

namespace moestro {
namespace {

constexpr Kernels kFloat{.form = Form::kFloat,
                         .direct = direct,
                         .decode = decode,
                         .decode_fp8 = decode_fp8,
                         .decode_int4 = decode_int4,
                         .multiply = multiply,
                         .activate_gated = activate_gated<FloatLine>,
                         .activate = activate<FloatLine>,
                         .combine = combine,
                         .gather = gather_lines<float_chunk>,
                         .store_result = store_result};

[[maybe_unused]] constexpr Kernels kInt16{.form = Form::kBytes,
                                          .decoded_block = kDecodedBytes,
                                          .direct = direct_integers<Words>,
                                          .decode = decode_integers,
                                          .multiply = multiply_integers<Words>,
                                          .activate_gated = activate_gated<BytesLine>,
                                          .activate = activate<BytesLine>,
                                          .combine = combine,
                                          .gather = gather_lines<bytes_chunk>,
                                          .store_result = store_result};

constexpr Kernels kInt8{.form = Form::kInt8,
                        .decoded_block = kDecodedBytes,
                        .direct = direct_integers<Bytes>,
                        .decode = decode_integers,
                        .multiply = multiply_integers<Bytes>,
                        .activate_gated = activate_gated<ExactFloatLine>,
                        .activate = activate<ExactFloatLine>,
                        .quantize = quantize_int8,
                        .combine = combine,
                        .gather = gather_lines<put_int8>,
                        .store_result = store_result};

}  // namespace
}  // namespace moestro

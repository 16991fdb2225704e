// Plain C++ for machines without a table of their own.
#include "plain.h"

namespace moestro {
namespace {

constexpr Kernels kBf16{.decode = decode,
                        .decode_fp8 = decode_fp8,
                        .multiply = multiply,
                        .activate_gated = activate_gated<Bf16Line>,
                        .activate = activate<Bf16Line>,
                        .combine = combine,
                        .gather = gather,
                        .store_result = store_result};

constexpr Kernels kInt8{.form = Form::kInt8,
                        .decoded_block = kDecodedInt8,
                        .decode = decode_int8,
                        .multiply = multiply_int8,
                        .activate_gated = activate_gated<ExactFloatLine>,
                        .activate = activate<ExactFloatLine>,
                        .quantize = quantize_int8,
                        .combine = combine,
                        .gather = gather_lines<put_int8>,
                        .store_result = store_result};

}  // namespace

const Kernels* kernels_generic(const MoestroLayer& layer) {
  return layer.input_format == MOESTRO_INPUT_INT8 ? &kInt8 : &kBf16;
}

int64_t spin_generic(int arithmetic, int64_t rounds) {  // float32, as the compiler vectorises it
  if (arithmetic != MOESTRO_FLOAT32) return 0;
  constexpr int kSums = 64, kSteps = 8;
  float sum[kSums] = {}, a = 1.f;
  for (int64_t i = 0; i < rounds * kSteps; ++i) {
    for (int s = 0; s < kSums; ++s) sum[s] += a * static_cast<float>(s);
#if defined(__GNUC__)
    __asm__ volatile("" : "+m"(a));
#endif
  }
  float all = 0.f;
  for (const float one : sum) all += one;
  volatile float kept = all;
  (void)kept;
  return rounds * kSteps * kSums * 2;
}

}  // namespace moestro

// NEON with dot products of bf16 as well (Neoverse V1, N2, Apple M2, Cortex-A710, and newer): for bf16, FP8 and INT4
// weights with a bf16 x. NVFP4 and MXFP4 stay integers, whose decoding costs an eighth; a float16 or float32 x is
// multiplied exactly.
//
// bfdot adds two products, rounding to odd, which errs no more than a rounding to nearest does, and takes subnormal bf16
// for zero. Panels of pairs and lines of bf16 are its operands as they lie.
#include "kernels_neon_tables.h"
#include "spin_neon.h"

namespace moestro {
namespace {

inline bfloat16x8_t eight(const uint16_t* at) { return vreinterpretq_bf16_u16(vld1q_u16(at)); }

// sums += pair kLane of eight columns
template <int T, int kLane>
MOESTRO_INLINE void add_dots(Sums<T>& total, const uint16_t* line, const bfloat16x8_t* x) {
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; ++q) {
    const bfloat16x8_t w = eight(line + kLane * kTileRows + 8 * q);
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) total.of[t][q] = vbfdotq_laneq_f32(total.of[t][q], w, x[t], kLane);
  }
}

template <int T>
void multiply_dots(const uint16_t* line, int blocks, const Tokens& x, float* sums) {
  Sums<T> total(sums);
  for (int b = 0; b < blocks; ++b)
    for (int half = 0; half < 2; ++half, line += 4 * kTileRows) {
      const uint16_t* at = x.data + b / 2 * x.stride + b % 2 * kBlock + half * kBlock / 2;
      bfloat16x8_t columns[T];
#pragma GCC unroll 5
      for (int t = 0; t < T; ++t) columns[t] = eight(at + t * kChunk);
      add_dots<T, 0>(total, line, columns);
      add_dots<T, 1>(total, line, columns);
      add_dots<T, 2>(total, line, columns);
      add_dots<T, 3>(total, line, columns);
    }
  total.store(sums);
}

void multiply_bf16(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  const int all = w.panels * ((x.count + kDenseTokens - 1) / kDenseTokens), ask = (ahead.lines + all - 1) / all;
  for (int p = 0; p < w.panels; ++p)
    each_piece<kDenseTokens>(x.count, [&]<int T>(int first) {
      ahead.ask(ask);
      multiply_dots<T>(w.data + p * w.stride, blocks, tokens_from(x, first, kChunk),
                       sums + first * kTileRows + p * kPanel);
    });
}

constexpr Kernels kBf16{.decode = decode,
                        .decode_fp8 = decode_fp8,
                        .decode_int4 = decode_int4,
                        .multiply = multiply_bf16,
                        .activate_gated = activate_gated<Bf16Line>,
                        .activate = activate<Bf16Line>,
                        .combine = combine,
                        .gather = gather,
                        .store_result = store_result};

struct Bf16s {
  using Register = float32x4_t;
  static constexpr int64_t kOperations = 2 * 8;
  static Register zero() { return vdupq_n_f32(0.f); }
  static Register step(Register sum, Register a, Register b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
  }
};

}  // namespace

const Kernels* kernels_neon_bf16(const MoestroLayer& layer) {
  if (layer.input_format == MOESTRO_INPUT_INT8) return &kInt8;
  if (layer.x_type != MOESTRO_X_BF16) return &kFloat;
  return is_fp4(layer.format) ? &kInt16 : &kBf16;
}

int64_t spin_neon_bf16(int arithmetic, int64_t rounds) {
  switch (arithmetic) {
    case MOESTRO_FLOAT32: return spin<Floats>(rounds);
    case MOESTRO_DOT_BF16: return spin<Bf16s>(rounds);
    case MOESTRO_DOT_INT16: return spin<Int16s>(rounds);
    case MOESTRO_DOT_INT8: return spin<Int8s>(rounds);
    default: return 0;
  }
}

}  // namespace moestro

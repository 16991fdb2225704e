// Dot products of bytes: one instruction where the processor has them (dotprod), five without. Results are the same bits.
#pragma once
#include <arm_neon.h>

namespace moestro {
namespace {

// sum + four rows of four columns, times the four columns of a token in lane kLane.
template <int kLane>
inline int32x4_t dot8(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(sum, w, x, kLane);
#else
  const int8x16_t columns = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), kLane));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(columns)), high = vmull_high_s8(w, columns);
  return vpadalq_s16(sum, vpaddq_s16(low, high));  // two columns: at most 2 * 12 * 128
#endif
}

inline int32x4_t dot_block(int32x4_t sum, const int8x16_t* w, int8x16_t x) {  // of four groups of four columns
  sum = dot8<0>(sum, w[0], x);
  sum = dot8<1>(sum, w[1], x);
  sum = dot8<2>(sum, w[2], x);
  return dot8<3>(sum, w[3], x);
}

}  // namespace
}  // namespace moestro

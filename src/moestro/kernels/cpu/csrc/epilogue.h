// The element-wise ends of both products, in plain loops over 16 lanes that the compiler vectorises for the instruction
// set of the file which includes this. Everything is static: each file has its own copy. `Line` is a form of numbers.h or
// quantize.h: how many elements a token's line has, and how 16 values are put into one of its halves.
#pragma once
#include "numbers.h"

namespace moestro {
namespace {

// 1 / (1 + exp(-v)): 2^n by its exponent bits, 2^f by its series to f^6, relative error under 3e-7.
inline float sigmoid(float v) {
  float y = v * -1.442695041f;
  // Within [-126, 126], in integers: of comparisons of floats GCC makes three masked ways for all that follows.
  const auto most = static_cast<int32_t>(bits_of(y));
  const auto least = static_cast<uint32_t>(most < 0x42FC0000 ? most : 0x42FC0000);
  y = float_of(least < 0xC2FC0000u ? least : 0xC2FC0000u);
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = y + shifter;
  const float f = y - (shifted - shifter);
  float p = 1.540353e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const float power = float_of((bits_of(shifted) - 0x4B400000u + 127u) << 23);
  return 1.f / (1.f + p * power);
}

// Scale and bias of a tile's rows, 1 and 0 where there are none: no branches in the loops over tokens.
struct Affine {
  alignas(64) float scale[kTileRows];
  alignas(64) float bias[kTileRows];

  Affine(const Epilogue& end, int rows) {
    for (int i = 0; i < rows; ++i) scale[i] = end.row_scale ? end.row_scale[i] : 1.f;
    for (int i = 0; i < rows; ++i) bias[i] = end.bias ? end.bias[i] : 0.f;
  }
  void apply(int offset, const float* sums, float* h) const {  // 16 lanes
    for (int i = 0; i < kPanel; ++i) h[i] = sums[offset + i] * scale[offset + i] + bias[offset + i];
  }
};

inline void swiglu(const Epilogue& end, const float* gate, const float* up, float* a) {
  const float limit = end.limit, alpha = end.alpha, shift = end.up_shift;
  for (int i = 0; i < kPanel; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    float u = up[i] > limit ? limit : up[i];
    u = u < -limit ? -limit : u;
    a[i] = (u + shift) * g * sigmoid(alpha * g);
  }
}

inline void geglu_tanh(const float* gate, const float* up, float* a) {  // (1 + tanh z) / 2 = sigmoid(2 z)
  for (int i = 0; i < kPanel; ++i) {
    const float g = gate[i];
    a[i] = up[i] * g * sigmoid(1.5957691216f * (g + 0.044715f * g * g * g));
  }
}

template <class Line>
void activate_gated(const Epilogue& end, const float* sums, int tokens, int half, uint16_t* lines) {
  const Affine affine(end, kTileRows);
  alignas(64) float gate[kPanel], up[kPanel], a[kPanel];
  for (int t = 0; t < tokens; ++t, sums += kTileRows, lines += Line::size(end.x_type)) {
    affine.apply(0, sums, gate);
    affine.apply(kPanel, sums, up);
    if (end.activation == MOESTRO_SWIGLU)
      swiglu(end, gate, up, a);
    else
      geglu_tanh(gate, up, a);
    Line::put(end.x_type, a, half, lines);
  }
}

template <class Line>
void activate(const Epilogue& end, const float* sums, int tokens, int panels, uint16_t* lines) {
  const Affine affine(end, panels * kPanel);
  alignas(64) float h[kPanel];
  for (int t = 0; t < tokens; ++t, sums += kTileRows, lines += Line::size(end.x_type))
    for (int p = 0; p < panels; ++p) {
      affine.apply(p * kPanel, sums, h);
      for (int i = 0; i < kPanel; ++i) h[i] = h[i] < 0.f ? 0.f : h[i];
      for (int i = 0; i < kPanel; ++i) h[i] *= h[i];
      Line::put(end.x_type, h, p, lines);
    }
}

void combine(const Epilogue& end, const float* sums, int tokens, int columns, const int32_t* token,
             const float* weight, float* result, int64_t stride) {
  const Affine affine(end, columns);
  for (int t = 0; t < tokens; ++t, sums += kTileRows) {
    float* to = result + token[t] * stride;
    const float w = weight[t];
    for (int c = 0; c < columns; c += kPanel)
      for (int i = c; i < c + kPanel; ++i) to[i] += w * (sums[i] * affine.scale[i] + affine.bias[i]);
  }
}

}  // namespace
}  // namespace moestro

// Decoding and products in plain C++: for any machine, and the definition of what the fast kernels compute.
#pragma once
#include "epilogue.h"

namespace moestro {
namespace {

constexpr float kE2m1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

float widen(uint16_t bf16) { return float_of(static_cast<uint32_t>(bf16) << 16); }

// e4m3 * 2^-8, as the half with the same bits; the 2^8 is in the row scale.
float e4m3_shifted(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float subnormal = static_cast<float>(mantissa) * 0x1p-17f;
  const float normal = float_of(static_cast<uint32_t>(exponent - 15 + 127) << 23 | static_cast<uint32_t>(mantissa) << 20);
  return exponent ? normal : subnormal;
}

void decode(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int b = 0; b < blocks; ++b, codes += kCodeBytes)
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < kTileRows; ++lane) {
          uint16_t word;
          std::memcpy(&word, codes + 64 * half + 2 * lane, 2);
          const uint8_t code = from.scale(p, b)[lane / 2];
          const float scale = from.mx ? float_of(static_cast<uint32_t>(code) << 23) : e4m3_shifted(code);
          for (int j = 0; j < 4; ++j)
            dense[((p * blocks + b) * 8 + 4 * half + j) * kTileRows + lane] =
                static_cast<uint16_t>(bits_of(kE2m1[word >> 4 * j & 15] * scale) >> 16);
        }
  }
}

void multiply(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  ahead.ask(ahead.lines);
  for (int t = 0; t < x.count; ++t)
    for (int p = 0; p < w.panels; ++p) {
      float* to = sums + t * kTileRows + p * kPanel;
      const uint16_t* line = w.data + p * w.stride;
      for (int k = 0; k < blocks * kBlock; k += 2, line += kTileRows) {
        const uint16_t* at = x.data + k / kChunk * x.stride + t * kChunk + k % kChunk;
        const float even = widen(at[0]), odd = widen(at[1]);
        for (int r = 0; r < kPanel; ++r) to[r] += widen(line[2 * r]) * even + widen(line[2 * r + 1]) * odd;
      }
    }
}

}  // namespace
}  // namespace moestro

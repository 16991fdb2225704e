// Decoding and products in plain C++: for any machine, and the definition of what the fast kernels compute.
#pragma once
#include "epilogue.h"
#include "quantize.h"

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

void decode_fp8(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p)
    for (int i = 0; i < blocks * kBlock * kPanel; ++i) {
      const uint8_t code = from.codes[p * from.code_stride + i];
      const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
      *dense++ = static_cast<uint16_t>((sign | bits_of(e4m3_shifted(code & 0x7F))) >> 16);
    }
}

// int8: blocks of [4 groups of columns, 16 rows, 4 columns] of 12 + 2 e2m1, then the scales of 16 rows in float32.
constexpr int kDecodedInt8 = kBlock * kPanel / 2 + 2 * kPanel;

inline void decode_int8(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p)
    for (int b = 0; b < blocks; ++b, dense += kDecodedInt8) {
      const uint8_t* codes = from.codes + p * from.code_stride + b * kCodeBytes;
      auto* to = reinterpret_cast<uint8_t*>(dense);
      for (int i = 0; i < 2 * kCodeBytes; ++i) {
        const int group = i / 64, code = codes[group / 2 * 64 + i % 64] >> group % 2 * 4 & 15;
        to[i] = static_cast<uint8_t>(12 + static_cast<int>(2 * kE2m1[code]));
      }
      auto* scales = reinterpret_cast<float*>(dense + kDecodedInt8) - kPanel;
      for (int r = 0; r < kPanel; ++r) {
        const uint8_t code = from.scale(p, b)[r];
        scales[r] = from.mx ? float_of(static_cast<uint32_t>(code) << 23) : e4m3_shifted(code);
      }
    }
}

inline void multiply_int8(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  ahead.ask(ahead.lines);
  for (int t = 0; t < x.count; ++t)
    for (int p = 0; p < w.panels; ++p) {
      float* to = sums + t * kTileRows + p * kPanel;
      const uint16_t* dense = w.data + p * w.stride;
      for (int b = 0; b < blocks; ++b, dense += kDecodedInt8) {
        const uint16_t* line = x.data + b / 2 * x.stride + t * kInt8Line;
        const auto* bytes = reinterpret_cast<const int8_t*>(line) + b % 2 * kBlock;
        const auto* weights = reinterpret_cast<const uint8_t*>(dense);
        const auto* scales = reinterpret_cast<const float*>(dense + kDecodedInt8) - kPanel;
        float facts[3];
        std::memcpy(facts, line + kChunk / 2, sizeof facts);
        for (int r = 0; r < kPanel; ++r) {
          int32_t sum = 0;
          for (int i = 0; i < kBlock; ++i) sum += weights[i / 4 * 64 + 4 * r + i % 4] * bytes[i];
          to[r] += (static_cast<float>(sum) * facts[0] - facts[1 + b % 2]) * scales[r];
        }
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

// INT4 in groups: (code - zero) is decoded to bf16, exactly; a group's sum meets its scale, a number for each row.
//
// Codes lie as those of fp4. Of Codes, `scales` are here the zero points of the 16 rows (or null: 8), for one group.
#pragma once
#include <cstring>

#include "kernels.h"

namespace moestro {

constexpr int kSymmetric = 8;  // the zero point where there is none

struct Int4Codes {         // panels of a tile, from end to end
  const uint8_t* codes;
  const uint8_t* scales;   // of scale_type, [groups, 16] a panel
  const uint8_t* zeros;    // [groups, 16] a panel, or null
  int64_t code_stride;     // bytes from a panel to the next
  int64_t groups;          // of a row
  int group_blocks;        // blocks of 16 columns in a group
  int scale_type;
  int panels;
  const uint8_t* next;     // codes that will be read after these, to prefetch
};

inline float int4_scale(const uint8_t* scales, int type, int64_t i) {
  uint32_t bits = 0;
  if (type == MOESTRO_X_FP32) {
    std::memcpy(&bits, scales + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, scales + 2 * i, 2);
    if (type == MOESTRO_X_FP16) {
      const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;  // never negative nor infinite
      if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-24f;
      bits = (exponent + 112) << 23 | mantissa << 13;
    } else {
      bits = static_cast<uint32_t>(half) << 16;
    }
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int scale_bytes(int type) { return type == MOESTRO_X_FP32 ? 4 : 2; }

// Plain C++, for the tables without one of their own.
inline void decode_int4_plain(const Codes& from, int blocks, uint16_t* dense) {
  for (int p = 0; p < from.panels; ++p) {
    const uint8_t* codes = from.codes + p * from.code_stride;
    for (int b = 0; b < blocks; ++b, codes += kCodeBytes)
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < kTileRows; ++lane) {
          uint16_t word;
          std::memcpy(&word, codes + 64 * half + 2 * lane, 2);
          const int zero = from.scales ? from.scales[p * from.scale_stride + lane / 2] : kSymmetric;
          for (int j = 0; j < 4; ++j) {
            const float value = static_cast<float>((word >> 4 * j & 15) - zero);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            dense[((p * blocks + b) * 8 + 4 * half + j) * kTileRows + lane] = static_cast<uint16_t>(bits >> 16);
          }
        }
  }
}

}  // namespace moestro

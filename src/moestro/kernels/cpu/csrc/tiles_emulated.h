// The same layer in plain C++, so that the AMX path's logic is tested on machines without AMX.
#pragma once
#include "epilogue.h"

#define MOESTRO_TILE_ZERO(t) tile_zero(t)
#define MOESTRO_TILE_LOAD(t, base, stride) tile_load(t, base, stride)
#define MOESTRO_TILE_STORE(t, base, stride) tile_store(t, base, stride)
#define MOESTRO_TILE_DOT(c, a, b) tile_dot(c, a, b)

namespace moestro {
namespace {

struct Tile {
  uint8_t bytes[16][64];
};
thread_local Tile g_tiles[8];
thread_local bool g_configured = false;

void configure_tiles() { g_configured = true; }
void release_tiles() { g_configured = false; }

inline Tile& tile(int t) {
  if (!g_configured) __builtin_trap();  // the instruction would fault
  return g_tiles[t];
}
inline void tile_zero(int t) { tile(t) = Tile{}; }
inline void tile_load(int t, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(t).bytes[r], static_cast<const uint8_t*>(base) + r * stride, 64);
}
inline void tile_store(int t, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile(t).bytes[r], 64);
}
inline float tile_bf16(const Tile& from, int row, int column) {
  uint16_t value;
  std::memcpy(&value, from.bytes[row] + 2 * column, 2);
  return float_of(static_cast<uint32_t>(value) << 16);
}

// TDPBF16PS (Intel SDM): c[m][n] += a[m][2k] * b[k][2n] + a[m][2k+1] * b[k][2n+1]
inline void tile_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, tile(c).bytes[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        sum += tile_bf16(tile(a), m, 2 * k) * tile_bf16(tile(b), k, 2 * n) +
               tile_bf16(tile(a), m, 2 * k + 1) * tile_bf16(tile(b), k, 2 * n + 1);
      std::memcpy(tile(c).bytes[m] + 4 * n, &sum, 4);
    }
}

}  // namespace
}  // namespace moestro

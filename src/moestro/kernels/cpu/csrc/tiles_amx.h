// The thin layer over AMX: eight tile registers of 16 rows x 64 bytes. The register is a literal, as the
// instructions encode it.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define MOESTRO_TILE_ZERO(t) _tile_zero(t)
#define MOESTRO_TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define MOESTRO_TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define MOESTRO_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

namespace moestro {
namespace {

void configure_tiles() {  // palette 1, all eight tiles at full size
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

void release_tiles() { _tile_release(); }

}  // namespace
}  // namespace moestro

// AMX bf16 (Sapphire Rapids and newer): tiles for products of bf16, AVX-512 for the rest.
#include "tiles_amx.h"

#include "amx.h"
#include "kernels_avx512_tables.h"

namespace moestro {
namespace {

constexpr Kernels tiled() {
  Kernels table = bf16_table(multiply_tiles<multiply>);
  table.enter = configure_tiles;
  table.leave = release_tiles;
  return table;
}

constexpr Kernels kTiles = tiled();

}  // namespace

// Batch invariance: how a tile orders its additions is not stated, so AVX-512 multiplies whatever the number of tokens.
const Kernels* kernels_amx(const MoestroLayer& layer) {
  if (layer.input_format == MOESTRO_INPUT_INT8) return &kInt8;
  return layer.batch_invariant ? invariant(layer) : &kTiles;
}

int64_t spin_amx(int arithmetic, int64_t rounds) {
  if (arithmetic != MOESTRO_DOT_BF16) return 0;
  configure_tiles();
  MOESTRO_TILE_ZERO(0);
  MOESTRO_TILE_ZERO(1);
  MOESTRO_TILE_ZERO(2);
  MOESTRO_TILE_ZERO(3);
  MOESTRO_TILE_ZERO(4);
  MOESTRO_TILE_ZERO(5);
  MOESTRO_TILE_ZERO(6);
  MOESTRO_TILE_ZERO(7);
  for (int64_t i = 0; i < rounds; ++i) {
    MOESTRO_TILE_DOT(0, 4, 6);
    MOESTRO_TILE_DOT(1, 4, 7);
    MOESTRO_TILE_DOT(2, 5, 6);
    MOESTRO_TILE_DOT(3, 5, 7);
  }
  release_tiles();
  return rounds * 4 * 16 * 16 * 32 * 2;
}

}  // namespace moestro

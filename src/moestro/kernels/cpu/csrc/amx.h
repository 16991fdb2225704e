// Products on AMX tiles, over the layer of tiles_amx.h or tiles_emulated.h, included before.
//
// Panels are already what the instruction wants: 16 pairs of columns of a panel are its second operand, 16 tokens of a
// token panel its first. Up to 32 tokens x 2 panels of sums stay in four tiles. A tile with fewer than 16 tokens reads
// lines past the last token (the workspace goes on there) and drops those rows of the sums.
#pragma once
#include "kernels.h"

namespace moestro {
namespace {

constexpr int kTileTokens = 16;
constexpr int64_t kSumBytes = kTileRows * 4, kLineBytes = 64;

// Tiles: 0..3 sums (tokens x panels), 4 and 5 tokens, 6 and 7 weights.
template <int M, int P>
inline void tile_chunks(const Dense& w, int chunks, const uint16_t* x, int64_t stride, float* sums) {
  MOESTRO_TILE_LOAD(0, sums, kSumBytes);
  if (P == 2) MOESTRO_TILE_LOAD(1, sums + kPanel, kSumBytes);
  if (M == 2) MOESTRO_TILE_LOAD(2, sums + kTileTokens * kTileRows, kSumBytes);
  if (M == 2 && P == 2) MOESTRO_TILE_LOAD(3, sums + kTileTokens * kTileRows + kPanel, kSumBytes);
  const uint16_t* line = w.data;
  for (int c = 0; c < chunks; ++c, x += stride, line += kPanel * kChunk) {
    MOESTRO_TILE_LOAD(4, x, kLineBytes);
    MOESTRO_TILE_LOAD(6, line, kLineBytes);
    MOESTRO_TILE_DOT(0, 4, 6);
    if (P == 2) {
      MOESTRO_TILE_LOAD(7, line + w.stride, kLineBytes);
      MOESTRO_TILE_DOT(1, 4, 7);
    }
    if (M == 2) {
      MOESTRO_TILE_LOAD(5, x + kTileTokens * kChunk, kLineBytes);
      MOESTRO_TILE_DOT(2, 5, 6);
      if (P == 2) MOESTRO_TILE_DOT(3, 5, 7);
    }
  }
  MOESTRO_TILE_STORE(0, sums, kSumBytes);
  if (P == 2) MOESTRO_TILE_STORE(1, sums + kPanel, kSumBytes);
  if (M == 2) MOESTRO_TILE_STORE(2, sums + kTileTokens * kTileRows, kSumBytes);
  if (M == 2 && P == 2) MOESTRO_TILE_STORE(3, sums + kTileTokens * kTileRows + kPanel, kSumBytes);
}

template <int P>
void tile_tokens(const Dense& w, int chunks, const Tokens& x, float* sums) {
  int t = 0;
  for (; t + 2 * kTileTokens <= x.count; t += 2 * kTileTokens)
    tile_chunks<2, P>(w, chunks, x.data + t * kChunk, x.stride, sums + t * kTileRows);
  for (; t + kTileTokens <= x.count; t += kTileTokens)
    tile_chunks<1, P>(w, chunks, x.data + t * kChunk, x.stride, sums + t * kTileRows);
  if (const int rest = x.count - t) {
    alignas(64) float padded[kTileTokens * kTileRows] = {};
    __builtin_memcpy(padded, sums + t * kTileRows, rest * kSumBytes);
    tile_chunks<1, P>(w, chunks, x.data + t * kChunk, x.stride, padded);
    __builtin_memcpy(sums + t * kTileRows, padded, rest * kSumBytes);
  }
}

// Few tokens, and columns that do not fill a tile, go to `Small`. By the published rates (a tile product of 16 cycles, 32
// tokens' worth of dot products a cycle otherwise) tiles pay from four tokens on; not measured: no such machine here.
template <void (*Small)(const Dense&, int, const Tokens&, float*, Ahead&)>
void multiply_tiles(const Dense& w, int blocks, const Tokens& x, float* sums, Ahead& ahead) {
  constexpr int kFewest = 4;
  const int chunks = x.count < kFewest ? 0 : blocks / 2;
  if (chunks > 0) ahead.ask(ahead.lines);
  if (chunks > 0 && w.panels == 2) tile_tokens<2>(w, chunks, x, sums);
  if (chunks > 0 && w.panels == 1) tile_tokens<1>(w, chunks, x, sums);
  const int done = 2 * chunks;
  if (done == blocks) return;
  const Dense rest{w.data + done * kBlock * kPanel, w.stride, w.panels};
  Small(rest, blocks - done, Tokens{x.data + chunks * x.stride, x.stride, x.count}, sums, ahead);
}

}  // namespace
}  // namespace moestro

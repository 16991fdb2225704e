// One wave of tokens: its pairs sorted by expert, cut into units, and where everything lies in the workspace.
#pragma once
#include <atomic>

#include "kernels.h"

namespace moestro {

struct Unit {        // tokens of one expert that are multiplied together
  int32_t expert;    // local
  int32_t tokens;    // 1 .. token_tile
  int64_t first;     // position of its first pair in the sorted order
};

struct Sizes {         // of a layer and a tactic; everything that follows from static facts
  int64_t x_columns;   // H rounded up to whole chunks
  int64_t a_columns;   // I likewise
  int64_t tiles1, tiles2;  // tiles of two panels of gate_up and of down
  int64_t wave;            // most tokens in a wave
  int64_t x_scratch;       // bytes of a unit's x
  int64_t partial;         // float32 of a unit's partial sums
  int64_t scratch;         // bytes per thread, beginning with it
  int64_t parts;           // lines of a token
  int64_t line;            // elements (of two bytes) of a line
  int64_t x_bytes;         // of an element of x

  Sizes(const MoestroLayer& layer, const MoestroTactic& tactic, int64_t tokens);
};

struct Plan {
  int32_t* token;     // [pairs] token within the wave, sorted by expert, then token
  float* weight;      // [pairs]
  Unit* units;
  std::atomic<int32_t>* taken;  // [units] groups of row tiles of the first product that somebody has taken
  int64_t pairs = 0, num_units = 0;
  uint16_t* a;        // token panels of the activations
  int64_t* cursor;    // [L + 1] scratch of the sort
  uint8_t* scratch;   // [threads]

  // Lay the plan out in `workspace` (null: only count); returns the bytes.
  int64_t place(uint8_t* workspace, const MoestroLayer& layer, const MoestroTactic& tactic, const Sizes& sizes);
  void sort(const MoestroLayer& layer, const MoestroTactic& tactic, const int32_t* ids, const float* weights,
            int64_t tokens);
};

// Columns of a tile that are multiplied at once. FP4: 2 panels x 512 columns are 32 KiB of bf16 (36 of integers with their
// scales), of which there are two: one is multiplied while the other is decoded. 256 columns were slower, 384 no faster.
constexpr int kPieceColumns = 512;
constexpr int64_t kPieceElements = 2 * kPieceColumns / kBlock * (kBlock * kPanel + 2 * kPanel);

}  // namespace moestro

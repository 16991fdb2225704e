#include "plan.h"

#include <algorithm>
#include <new>

namespace moestro {
namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

class Bump {
 public:
  explicit Bump(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ = round_up(used_ + count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace

Sizes::Sizes(const MoestroLayer& layer, const MoestroTactic& tactic, int64_t tokens) {
  const Kernels& kernels = *kernels_of(layer);
  x_columns = round_up(layer.hidden, kChunk);
  a_columns = round_up(layer.intermediate, kChunk);
  tiles1 = layer.gated ? layer.intermediate / kPanel : a_columns / kTileRows;
  tiles2 = x_columns / kTileRows;
  const int64_t waves = std::max<int64_t>(1, (tokens + tactic.wave - 1) / tactic.wave);
  wave = (tokens + waves - 1) / waves;
  const int64_t tile_rows = (static_cast<int64_t>(tactic.row_tile) + (kernels.quantize ? 1 : 0)) * kTileRows;
  // of a unit: a token comes as often as it names the expert
  const int64_t most = std::min<int64_t>(tactic.token_tile, std::max<int64_t>(wave * layer.top_k, 1));
  parts = kernels.parts(layer.x_type);
  line = line_of(kernels.form);
  x_bytes = layer.x_type == MOESTRO_X_FP32 ? 4 : 2;
  x_scratch = round_up(most * parts * x_columns / kChunk * line * 2, 64);
  partial = most * parts * kTileRows;  // of some columns; or activations to quantise
  scratch = x_scratch
            + round_up(most * parts * tile_rows * 4, 64)  // sums of one unit
            + partial * 4
            + round_up(wave * tile_rows * 4, 64)        // result rows of all tokens
            + 2 * kPieceElements * 2 + 4096;  // decoded weights; a page between threads
}

int64_t Plan::place(uint8_t* workspace, const MoestroLayer& layer, const MoestroTactic& tactic, const Sizes& sizes) {
  const int64_t most = sizes.wave * layer.top_k;
  Bump bump(workspace);
  token = bump.take<int32_t>(most);
  weight = bump.take<float>(most);
  const int64_t most_units = std::min<int64_t>(most, layer.experts + most / tactic.token_tile);
  units = bump.take<Unit>(most_units);
  taken = bump.take<std::atomic<int32_t>>(most_units);
  cursor = bump.take<int64_t>(layer.experts + 1);
  a = bump.take<uint16_t>(most * sizes.parts * sizes.line * (sizes.a_columns / kChunk));
  scratch = bump.take<uint8_t>(sizes.scratch * tactic.threads);
  return bump.used();
}

void Plan::sort(const MoestroLayer& layer, const MoestroTactic& tactic, const int32_t* ids, const float* weights,
                int64_t tokens) {
  const int64_t all = tokens * layer.top_k;
  const auto local = [&](int64_t pair) { return static_cast<int64_t>(ids[pair]) - layer.expert_offset; };
  std::fill(cursor, cursor + layer.experts + 1, 0);
  for (int64_t pair = 0; pair < all; ++pair)
    if (const int64_t e = local(pair); e >= 0 && e < layer.experts) ++cursor[e + 1];
  num_units = 0;
  for (int32_t e = 0; e < layer.experts; ++e) {
    const int64_t count = cursor[e + 1], begin = cursor[e];
    const int64_t pieces = (count + tactic.token_tile - 1) / tactic.token_tile;
    for (int64_t i = 0; i < pieces; ++i) {  // of equal size, give or take one
      const int64_t from = count * i / pieces, to = count * (i + 1) / pieces;
      new (taken + num_units) std::atomic<int32_t>(0);
      units[num_units++] = {e, static_cast<int32_t>(to - from), begin + from};
    }
    cursor[e + 1] += begin;
  }
  pairs = cursor[layer.experts];
  for (int64_t pair = 0; pair < all; ++pair) {
    const int64_t e = local(pair);
    if (e < 0 || e >= layer.experts) continue;
    const int64_t at = cursor[e]++;
    token[at] = static_cast<int32_t>(pair / layer.top_k);
    weight[at] = weights[pair];
  }
}

}  // namespace moestro

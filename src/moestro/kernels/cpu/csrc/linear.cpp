// One product with a bias, out[N, R] = x[N, C] W^T + b: a Linear layer on the experts' panels, decoders and products.
//
// W is the gate_up of a layer with one expert and no gate: R = I rows, C = H columns. Tokens are cut into units of equal
// size, rows into groups of tiles; an item is a group of a unit, and a thread takes the next one that nobody has. It
// gathers a unit's x once into its own cache: with few tokens that is 4 KiB beside megabytes of weights, with many it is
// read as often as there are groups. Nobody waits but at the region's end, columns are never split, and an element of
// `out` is summed by one thread in one order: results are bitwise equal whatever the number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "product.h"

namespace moestro {
namespace {

int64_t groups_of(int64_t all, int64_t size) { return (all + size - 1) / size; }

class Linear {
 public:
  Linear(const MoestroLayer& layer, const MoestroTactic& tactic, const Sizes& sizes, const void* x, void* out,
         int64_t tokens, uint8_t* workspace)
      : layer_(layer), kernels_(*kernels_of(layer)), sizes_(sizes), x_(static_cast<const uint8_t*>(x)),
        out_(static_cast<uint8_t*>(out)), tokens_(tokens), row_tile_(tactic.row_tile), threads_(tactic.threads),
        tiles_(groups_of(layer.intermediate, kTileRows)), groups_(groups_of(tiles_, row_tile_)),
        units_(groups_of(tokens, sizes.wave)), product_(layer, tactic, layer.gate_up, layer.intermediate, layer.hidden),
        token_(reinterpret_cast<int32_t*>(workspace)), weight_(reinterpret_cast<float*>(token_ + shared(sizes) / 8)),
        scratch_(workspace + shared(sizes)) {}

  static int64_t shared(const Sizes& sizes) { return groups_of(sizes.wave * 8, 64) * 64; }  // bytes before the scratch
  static int64_t bytes(const Sizes& sizes, int threads) { return shared(sizes) + sizes.scratch * threads; }

  void run() {
    for (int32_t t = 0; t < sizes_.wave; ++t) token_[t] = t, weight_[t] = 1.f;  // what combine() takes
    const int64_t items = units_ * groups_;
    parallel(static_cast<int>(std::min<int64_t>(threads_, items)), [&](int worker) {
      uint8_t* scratch = scratch_ + worker * sizes_.scratch;
      if (kernels_.enter) kernels_.enter();
      int64_t gathered = -1;
      for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items;) {
        const int64_t unit = item / groups_;
        if (unit != gathered) gather(unit, scratch);
        gathered = unit;
        multiply(unit, item % groups_, scratch);
      }
      if (kernels_.leave) kernels_.leave();
    });
  }

 private:
  int64_t begin(int64_t unit) const { return tokens_ * unit / units_; }
  int64_t count(int64_t unit) const { return begin(unit + 1) - begin(unit); }

  void gather(int64_t unit, uint8_t* scratch) const {
    auto* to = reinterpret_cast<uint16_t*>(scratch);
    const int64_t line = sizes_.parts * sizes_.line, stride = count(unit) * line, row = layer_.hidden * sizes_.x_bytes;
    for (int64_t i = 0; i < count(unit); ++i)
      kernels_.gather(layer_.x_type, x_ + (begin(unit) + i) * row, layer_.hidden, to + i * line, stride);
  }

  void add_parts(float* sums, int64_t lines) const {  // [lines, parts, 32] to [lines, 32], in place
    const int64_t parts = sizes_.parts;
    if (parts == 1) return;
    for (int64_t i = 0; i < lines; ++i)
      for (int r = 0; r < kTileRows; ++r) {
        float sum = 0.f;
        for (int64_t p = parts; p-- > 0;) sum += sums[(i * parts + p) * kTileRows + r];  // the smallest first
        sums[i * kTileRows + r] = sum;
      }
  }

  void multiply(int64_t unit, int64_t group, uint8_t* scratch) {
    const int64_t tile = group * row_tile_, tiles = std::min(row_tile_, tiles_ - tile), many = count(unit);
    const int64_t lines = many * sizes_.parts, row = tile * kTileRows, stride = row_tile_ * kTileRows;
    const int64_t rows = std::min<int64_t>(tiles * kTileRows, layer_.intermediate - row);
    const Tokens tokens{reinterpret_cast<uint16_t*>(scratch), lines * sizes_.line, static_cast<int>(lines)};
    auto* decoded = reinterpret_cast<uint16_t*>(scratch + sizes_.x_scratch);
    const Room room{decoded, reinterpret_cast<float*>(decoded + 2 * kPieceElements)};
    float* result = room.partial + sizes_.partial;
    float* sums = result + many * stride;
    const int64_t next = next_.load(std::memory_order_relaxed);  // what this thread probably takes then
    const Place after{next < units_ * groups_ ? 0 : -1, next % groups_ * row_tile_};
    product_.run({0, tile}, tiles, after, tokens, sums, room);
    add_parts(sums, tiles * many);
    std::memset(result, 0, sizeof(float) * many * stride);
    for (int64_t t = 0; t < tiles; ++t) {
      const MoestroMatrix& m = layer_.gate_up;
      const int64_t at = row + t * kTileRows;
      const Epilogue end{m.row_scale ? m.row_scale + at : nullptr, m.bias ? m.bias + at : nullptr, 0, 0.f, 0.f, 0.f,
                         layer_.x_type};
      kernels_.combine(end, sums + t * many * kTileRows, static_cast<int>(many),
                       static_cast<int>(std::min<int64_t>(kTileRows, rows - t * kTileRows)), token_, weight_,
                       result + t * kTileRows, stride);
    }
    for (int64_t n = 0; n < many; ++n)
      kernels_.store_result(layer_.x_type, result + n * stride,
                            out_ + ((begin(unit) + n) * layer_.intermediate + row) * sizes_.x_bytes, rows);
  }

  const MoestroLayer& layer_;
  const Kernels& kernels_;
  const Sizes& sizes_;
  const uint8_t* x_;
  uint8_t* out_;
  const int64_t tokens_, row_tile_, threads_, tiles_, groups_, units_;
  const Product product_;
  int32_t* token_;
  float* weight_;
  uint8_t* scratch_;
  alignas(64) std::atomic<int64_t> next_{0};
};

Sizes sizes_of(const MoestroLayer& layer, MoestroTactic tactic, int64_t tokens) {
  tactic.wave = tactic.token_tile;  // a unit is a wave
  return Sizes(layer, tactic, tokens);
}

}  // namespace
}  // namespace moestro

using namespace moestro;

int64_t moestro_cpu_linear_workspace(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens) {
  if (!kernels_of(*layer)) return 0;
  return Linear::bytes(sizes_of(*layer, *tactic, tokens), tactic->threads);
}

int32_t moestro_cpu_linear(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens, const void* x,
                           void* out, uint8_t* workspace, int64_t workspace_bytes) {
  if (!kernels_of(*layer)) return MOESTRO_NO_ISA;
  if (tokens <= 0) return MOESTRO_OK;
  const Sizes sizes = sizes_of(*layer, *tactic, tokens);
  if (Linear::bytes(sizes, tactic->threads) > workspace_bytes) return MOESTRO_SMALL_WORKSPACE;
  Linear(*layer, *tactic, sizes, x, out, tokens, workspace).run();
  return MOESTRO_OK;
}

// The layer: waves of tokens, each sorted, gathered, multiplied by gate_up with the activation, then by down with the
// weighted sum.
//
// Work items are taken from an atomic counter: (unit, row tiles) for gate_up, row tiles over all units for down. The
// columns of a product are never split, and a result row is summed by one thread over the units in order of expert:
// results are bitwise equal whatever the number of threads. Nothing is allocated.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "plan.h"

namespace moestro {
namespace {

class Wave {
 public:
  Wave(const MoestroLayer& layer, const MoestroTactic& tactic, const Sizes& sizes, const Plan& plan,
       const uint16_t* x, uint16_t* out, int64_t tokens)
      : layer_(layer), tactic_(tactic), sizes_(sizes), plan_(plan), kernels_(*kernels_of(layer.isa)), x_(x),
        out_(out), tokens_(tokens), gated_(layer.activation != MOESTRO_RELU2) {}

  void run() {
    for_items((plan_.pairs + kGather - 1) / kGather, [&](int64_t item, uint8_t*) { gather(item); });
    const int64_t groups1 = groups(sizes_.tiles1);
    for_items(plan_.num_units * groups1, [&](int64_t item, uint8_t* scratch) {
      first(plan_.units[item / groups1], item % groups1 * tactic_.row_tile, scratch);
    });
    for_items(groups(sizes_.tiles2), [&](int64_t item, uint8_t* scratch) { second(item * tactic_.row_tile, scratch); });
  }

 private:
  static constexpr int64_t kGather = 16;  // pairs per item
  static constexpr int kFewWork = 4;      // items that are not worth waking other threads for

  int64_t groups(int64_t tiles) const { return (tiles + tactic_.row_tile - 1) / tactic_.row_tile; }

  template <class F>
  void for_items(int64_t items, F&& body) {
    std::atomic<int64_t> next{0};
    parallel(items <= kFewWork ? 1 : tactic_.threads, [&](int worker) {
      uint8_t* scratch = plan_.scratch + worker * sizes_.scratch;
      if (kernels_.enter) kernels_.enter();
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item, scratch);
      if (kernels_.leave) kernels_.leave();
    });
  }

  const Unit& unit_of(int64_t position) const {
    const Unit* after = std::upper_bound(plan_.units, plan_.units + plan_.num_units, position,
                                         [](int64_t at, const Unit& unit) { return at < unit.first; });
    return after[-1];
  }

  void gather(int64_t item) {
    const int64_t end = std::min(plan_.pairs, (item + 1) * kGather);
    const int64_t whole = layer_.hidden / kChunk, rest = layer_.hidden % kChunk;
    for (int64_t at = item * kGather; at < end; ++at) {
      const Unit& unit = unit_of(at);
      const uint16_t* from = x_ + static_cast<int64_t>(plan_.token[at]) * layer_.hidden;
      uint16_t* to = plan_.x + unit.first * sizes_.x_columns + (at - unit.first) * kChunk;
      const int64_t stride = static_cast<int64_t>(unit.tokens) * kChunk;
      for (int64_t c = 0; c < whole; ++c, from += kChunk, to += stride) std::memcpy(to, from, 2 * kChunk);
      if (rest) {
        std::memset(to, 0, 2 * kChunk);
        std::memcpy(to, from, 2 * rest);
      }
    }
  }

  Tokens tokens_of(const uint16_t* panels, const Unit& unit, int64_t columns) const {
    return {panels + unit.first * columns, static_cast<int64_t>(unit.tokens) * kChunk, unit.tokens};
  }

  // sums [tiles, T, 32] = tiles of expert e's [rows, columns] times tokens; expert `after` comes next (-1: unknown)
  void product(const MoestroMatrix& m, int64_t e, int64_t after, int64_t rows, int64_t columns, int64_t tile,
               int64_t tiles, const Tokens& tokens, float* sums, uint16_t* decoded) {
    std::memset(sums, 0, sizeof(float) * tiles * tokens.count * kTileRows);
    const int64_t blocks = columns / kBlock, panels = rows / kPanel;
    const bool fp4 = layer_.format != MOESTRO_BF16, mx = layer_.format == MOESTRO_MXFP4;
    const bool direct = fp4 && kernels_.direct && tokens.count < tactic_.dequant_from;
    const bool whole = direct || (!fp4 && tokens.count <= 12);
    const int64_t step = whole ? blocks : std::min<int64_t>(blocks, kDecodeColumns / kBlock);
    for (int64_t b = 0; b < blocks; b += step) {
      const int now = static_cast<int>(std::min(step, blocks - b));
      Tokens part = tokens;
      part.data += b / 2 * tokens.stride;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t panel = 2 * (tile + t);
        const int count = static_cast<int>(std::min<int64_t>(2, panels - panel));
        float* to = sums + t * tokens.count * kTileRows;
        const int64_t block = (e * panels + panel) * blocks + b;
        Dense dense{reinterpret_cast<const uint16_t*>(m.codes) + block * kPanel * kBlock, columns * kPanel, count};
        if (fp4) {
          const int64_t next = t + 1 < tiles ? block + 2 * blocks : after < 0 ? block : (after * panels + 2 * tile) * blocks;
          const Codes codes{m.codes + block * kCodeBytes, m.scales + (mx ? block / 2 : block) * kPanel,
                            blocks * kCodeBytes, (mx ? blocks / 2 : blocks) * kPanel, count,
                            m.codes + next * kCodeBytes, mx};
          if (direct) {
            kernels_.direct(codes, now, part, to);
            continue;
          }
          kernels_.decode(codes, now, decoded);
          dense = {decoded, static_cast<int64_t>(now) * kBlock * kPanel, count};
        }
        kernels_.multiply(dense, now, part, to);
      }
    }
  }

  Epilogue epilogue(const MoestroMatrix& m, int64_t e, int64_t rows, int64_t tile) const {
    const int64_t row = e * rows + tile * kTileRows;
    return {m.row_scale ? m.row_scale + row : nullptr, m.bias ? m.bias + row : nullptr, layer_.activation,
            layer_.alpha, layer_.limit, layer_.up_shift};
  }

  void first(const Unit& unit, int64_t tile, uint8_t* scratch) {
    const int64_t rows = static_cast<int64_t>(layer_.intermediate) * (gated_ ? 2 : 1);
    const int64_t tiles = std::min<int64_t>(tactic_.row_tile, sizes_.tiles1 - tile);
    auto* decoded = reinterpret_cast<uint16_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(scratch + 2 * kDecodeColumns * kPanel * 2);
    product(layer_.gate_up, unit.expert, -1, rows, layer_.hidden, tile, tiles,
            tokens_of(plan_.x, unit, sizes_.x_columns), sums, decoded);
    uint16_t* a = plan_.a + unit.first * sizes_.a_columns;
    const int64_t stride = static_cast<int64_t>(unit.tokens) * kChunk;
    for (int64_t t = tile; t < tile + tiles; ++t, sums += unit.tokens * kTileRows) {
      const Epilogue end = epilogue(layer_.gate_up, unit.expert, rows, t);
      if (gated_) {
        kernels_.activate_gated(end, sums, unit.tokens, a + t / 2 * stride + t % 2 * kPanel);
      } else {
        const int panels = static_cast<int>(std::min<int64_t>(2, rows / kPanel - 2 * t));
        kernels_.activate(end, sums, unit.tokens, panels, a + t * stride);
      }
    }
  }

  void second(int64_t tile, uint8_t* scratch) {
    const int64_t tiles = std::min<int64_t>(tactic_.row_tile, sizes_.tiles2 - tile);
    const int64_t column = tile * kTileRows, stride = static_cast<int64_t>(tactic_.row_tile) * kTileRows;
    const int64_t columns = std::min<int64_t>(tiles * kTileRows, layer_.hidden - column);
    auto* decoded = reinterpret_cast<uint16_t*>(scratch);
    auto* result = reinterpret_cast<float*>(scratch + 2 * kDecodeColumns * kPanel * 2);
    float* sums = result + tokens_ * stride;
    std::memset(result, 0, sizeof(float) * tokens_ * stride);
    for (int64_t u = 0; u < plan_.num_units; ++u) {
      const Unit& unit = plan_.units[u];
      const int64_t after = u + 1 < plan_.num_units ? plan_.units[u + 1].expert : -1;
      product(layer_.down, unit.expert, after, layer_.hidden, layer_.intermediate, tile, tiles,
              tokens_of(plan_.a, unit, sizes_.a_columns), sums, decoded);
      for (int64_t t = 0; t < tiles; ++t) {
        const Epilogue end = epilogue(layer_.down, unit.expert, layer_.hidden, tile + t);
        const int width = static_cast<int>(std::min<int64_t>(kTileRows, columns - t * kTileRows));
        kernels_.combine(end, sums + t * unit.tokens * kTileRows, unit.tokens, width, plan_.token + unit.first,
                         plan_.weight + unit.first, result + t * kTileRows, stride);
      }
    }
    for (int64_t n = 0; n < tokens_; ++n)
      kernels_.to_bf16(result + n * stride, out_ + n * layer_.hidden + column, columns);
  }

  const MoestroLayer& layer_;
  const MoestroTactic& tactic_;
  const Sizes& sizes_;
  const Plan& plan_;
  const Kernels& kernels_;
  const uint16_t* x_;
  uint16_t* out_;
  int64_t tokens_;
  bool gated_;
};

}  // namespace
}  // namespace moestro

using namespace moestro;

int32_t moestro_cpu_abi(void) { return MOESTRO_ABI; }

int64_t moestro_cpu_workspace(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens) {
  Plan plan;
  return plan.place(nullptr, *layer, *tactic, Sizes(*layer, *tactic, tokens));
}

int32_t moestro_cpu_moe(const MoestroLayer* layer, const MoestroTactic* tactic, const MoestroCall* call) {
  if (!kernels_of(layer->isa)) return MOESTRO_NO_ISA;
  const Sizes sizes(*layer, *tactic, call->tokens);
  Plan plan;
  if (plan.place(call->workspace, *layer, *tactic, sizes) > call->workspace_bytes) return MOESTRO_SMALL_WORKSPACE;
  for (int64_t n = 0; n < call->tokens; n += sizes.wave) {
    const int64_t tokens = std::min(sizes.wave, call->tokens - n);
    plan.sort(*layer, *tactic, call->ids + n * layer->top_k, call->weights + n * layer->top_k, tokens);
    Wave(*layer, *tactic, sizes, plan, call->x + n * layer->hidden, call->out + n * layer->hidden, tokens).run();
  }
  return MOESTRO_OK;
}

// The layer: waves of tokens, each sorted, gathered, multiplied by gate_up with the activation, then by down with the
// weighted sum.
//
// All of a wave is one parallel region. For gate_up a thread takes a unit, gathers its rows of x into its own cache and
// multiplies them by group after group of row tiles; when no unit is left it helps with the groups of others'. For down
// the items are row tiles over all units. A thread goes on when the groups of gate_up are done, whoever did them: a worker
// that the system has not woken yet keeps nobody waiting but at the region's end.
// The columns of a product are never split, and a result row is summed by one thread over the units in order of expert:
// results are bitwise equal whatever the number of threads. Nothing is allocated.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "product.h"

namespace moestro {
namespace {

template <class F>
void wait(F&& done) {
  constexpr int kSpins = 2000;  // some 20 us, the length of an item; then others may need the core
  for (int i = 0; !done(); ++i) {
    if (i > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#elif defined(__aarch64__)
    else __asm__ volatile("yield");
#endif
  }
}

class Phase {
 public:
  explicit Phase(int64_t items) : items_(items) {}

  template <class F>
  void run(F&& body) {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) body(item);
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  const int64_t items_;
};

class Wave {
 public:
  Wave(const MoestroLayer& layer, const MoestroTactic& tactic, const Sizes& sizes, const Plan& plan,
       const void* x, void* out, int64_t first, int64_t tokens)
      : layer_(layer), tactic_(tactic), sizes_(sizes), plan_(plan), kernels_(*kernels_of(layer)),
        x_(static_cast<const uint8_t*>(x) + first * layer.hidden * sizes.x_bytes),
        out_(static_cast<uint8_t*>(out) + first * layer.hidden * sizes.x_bytes), tokens_(tokens),
        gate_up_(layer, tactic, layer.gate_up, layer.intermediate * (layer.gated ? 2 : 1), layer.hidden),
        down_(layer, tactic, layer.down, layer.hidden, layer.intermediate) {}

  void run() {
    Phase seconds((sizes_.tiles2 + tactic_.row_tile - 1) / tactic_.row_tile);
    parallel(tactic_.threads, [&](int worker) {
      uint8_t* scratch = plan_.scratch + worker * sizes_.scratch;
      if (kernels_.enter) kernels_.enter();
      firsts(worker, scratch);
      seconds.run([&](int64_t item) { second(item * tactic_.row_tile, scratch); });
      if (kernels_.leave) kernels_.leave();
    });
  }

 private:
  int64_t groups1() const { return (sizes_.tiles1 + row_tile1_ - 1) / row_tile1_; }

  // Whole units as long as there are any, then what is left of others' units.
  void firsts(int worker, uint8_t* scratch) {
    for (int64_t unit; (unit = next_unit_.fetch_add(1, std::memory_order_relaxed)) < plan_.num_units;)
      share(unit, scratch);
    for (int64_t unit; (unit = least_taken(worker)) >= 0;) share(unit, scratch);
    const int64_t all = plan_.num_units * groups1();
    wait([&] { return first_done_.load(std::memory_order_acquire) >= all; });
  }

  void share(int64_t u, uint8_t* scratch) {
    const int64_t all = groups1();
    int64_t group = plan_.taken[u].fetch_add(1, std::memory_order_relaxed);
    if (group >= all) return;
    const Tokens tokens = gather(plan_.units[u], scratch);
    for (; group < all; group = plan_.taken[u].fetch_add(1, std::memory_order_relaxed)) {
      first(plan_.units[u], tokens, group, scratch);
      first_done_.fetch_add(1, std::memory_order_release);
    }
  }

  int64_t least_taken(int worker) const {  // of the units, the one with the most work left; -1: none has any
    int64_t found = -1, least = groups1();
    for (int64_t i = 0; i < plan_.num_units; ++i) {
      const int64_t u = (i + worker) % plan_.num_units, taken = plan_.taken[u].load(std::memory_order_relaxed);
      if (taken < least) found = u, least = taken;
    }
    return found;
  }

  // A unit's rows of x, into this thread's cache.
  Tokens gather(const Unit& unit, uint8_t* scratch) const {
    auto* to = reinterpret_cast<uint16_t*>(scratch);
    const int64_t lines = unit.tokens * sizes_.parts, stride = lines * sizes_.line;
    for (int64_t i = 0; i < unit.tokens; ++i)
      kernels_.gather(layer_.x_type, x_ + plan_.token[unit.first + i] * layer_.hidden * sizes_.x_bytes, layer_.hidden,
                      to + i * sizes_.parts * sizes_.line, stride);
    return {to, stride, static_cast<int>(lines)};
  }

  Tokens activations(const Unit& unit) const {
    const int64_t lines = unit.tokens * sizes_.parts, before = unit.first * sizes_.parts;
    return {plan_.a + before * sizes_.line * (sizes_.a_columns / kChunk), lines * sizes_.line, static_cast<int>(lines)};
  }

  Room room(uint8_t* scratch) const {
    auto* decoded = reinterpret_cast<uint16_t*>(scratch + sizes_.x_scratch);
    return {decoded, reinterpret_cast<float*>(decoded + 2 * kPieceElements)};
  }

  // Where sums begin, after the room for one unit's partial ones.
  float* sums_of(const Room& room) const { return room.partial + sizes_.partial; }

  void add_parts(float* sums, int64_t count) const {  // [count, parts, 32] to [count, 32], in place
    const int64_t parts = sizes_.parts;
    if (parts == 1) return;
    for (int64_t i = 0; i < count; ++i)
      for (int r = 0; r < kTileRows; ++r) {
        float sum = 0.f;
        for (int64_t p = parts; p-- > 0;) sum += sums[(i * parts + p) * kTileRows + r];  // the smallest first
        sums[i * kTileRows + r] = sum;
      }
  }

  Epilogue epilogue(const MoestroMatrix& m, int64_t e, int64_t rows, int64_t tile) const {
    const int64_t row = e * rows + tile * kTileRows;
    return {m.row_scale ? m.row_scale + row : nullptr, m.bias ? m.bias + row : nullptr, layer_.activation,
            layer_.alpha, layer_.limit, layer_.up_shift, layer_.x_type};
  }

  Place after(const Unit& unit, int64_t group) const {  // what this thread probably multiplies next
    if (group + 1 < groups1()) return {unit.expert, (group + 1) * row_tile1_};
    const int64_t next = next_unit_.load(std::memory_order_relaxed);
    return {next < plan_.num_units ? plan_.units[next].expert : -1, 0};
  }

  void first(const Unit& unit, const Tokens& tokens, int64_t group, uint8_t* scratch) {
    const int64_t tile = group * row_tile1_, tiles = std::min<int64_t>(row_tile1_, sizes_.tiles1 - tile);
    const Room of = room(scratch);
    float* sums = sums_of(of);
    gate_up_.run({unit.expert, tile}, tiles, after(unit, group), tokens, sums, of);
    add_parts(sums, tiles * unit.tokens);
    const Tokens to = activations(unit);
    for (int64_t t = tile; t < tile + tiles; ++t, sums += unit.tokens * kTileRows)
      activate(unit, t, sums, to, reinterpret_cast<uint16_t*>(of.partial));
  }

  // Tile t of gate_up, 16 columns of the intermediate (32 without a gate), to its lines. What is quantised in 32 columns
  // waits in `waiting` for its other half: groups then have an even number of tiles.
  void activate(const Unit& unit, int64_t t, const float* sums, const Tokens& to, uint16_t* waiting) const {
    const int64_t rows = static_cast<int64_t>(layer_.intermediate) * (layer_.gated ? 2 : 1);
    const Epilogue end = epilogue(layer_.gate_up, unit.expert, rows, t);
    const int64_t chunk = layer_.gated ? t / 2 : t;
    const int half = layer_.gated ? static_cast<int>(t % 2) : 0;
    const int panels = static_cast<int>(std::min<int64_t>(2, rows / kPanel - 2 * t));
    auto* lines = const_cast<uint16_t*>(to.data) + chunk * to.stride;
    const bool last = layer_.gated ? half == 1 || t + 1 == sizes_.tiles1 : true;
    uint16_t* at = kernels_.quantize ? waiting : lines;
    if (kernels_.quantize && half == 0) std::memset(waiting, 0, sizeof(float) * unit.tokens * kChunk);
    if (layer_.gated)
      kernels_.activate_gated(end, sums, unit.tokens, half, at);
    else
      kernels_.activate(end, sums, unit.tokens, panels, at);
    if (kernels_.quantize && last) kernels_.quantize(waiting, unit.tokens, lines);
  }

  void second(int64_t tile, uint8_t* scratch) {
    const int64_t tiles = std::min<int64_t>(tactic_.row_tile, sizes_.tiles2 - tile);
    const int64_t column = tile * kTileRows, stride = static_cast<int64_t>(tactic_.row_tile) * kTileRows;
    const int64_t columns = std::min<int64_t>(tiles * kTileRows, layer_.hidden - column);
    const Room of = room(scratch);
    float* result = sums_of(of);
    float* sums = result + tokens_ * stride;
    std::memset(result, 0, sizeof(float) * tokens_ * stride);
    for (int64_t u = 0; u < plan_.num_units; ++u) {
      const Unit& unit = plan_.units[u];
      const Place after{u + 1 < plan_.num_units ? plan_.units[u + 1].expert : -1, tile};
      down_.run({unit.expert, tile}, tiles, after, activations(unit), sums, of);
      add_parts(sums, tiles * unit.tokens);
      for (int64_t t = 0; t < tiles; ++t) {
        const Epilogue end = epilogue(layer_.down, unit.expert, layer_.hidden, tile + t);
        const int width = static_cast<int>(std::min<int64_t>(kTileRows, columns - t * kTileRows));
        kernels_.combine(end, sums + t * unit.tokens * kTileRows, unit.tokens, width, plan_.token + unit.first,
                         plan_.weight + unit.first, result + t * kTileRows, stride);
      }
    }
    for (int64_t n = 0; n < tokens_; ++n)
      kernels_.store_result(layer_.x_type, result + n * stride,
                            out_ + (n * layer_.hidden + column) * sizes_.x_bytes, columns);
  }

  const MoestroLayer& layer_;
  const MoestroTactic& tactic_;
  const Sizes& sizes_;
  const Plan& plan_;
  const Kernels& kernels_;
  const uint8_t* x_;
  uint8_t* out_;
  int64_t tokens_;
  Product gate_up_, down_;
  // of the first product: int8 lines hold the columns of two tiles
  const int64_t row_tile1_ = tactic_.row_tile + (kernels_.quantize ? tactic_.row_tile % 2 : 0);
  alignas(64) std::atomic<int64_t> next_unit_{0};
  alignas(64) std::atomic<int64_t> first_done_{0};
};

}  // namespace
}  // namespace moestro

using namespace moestro;

int32_t moestro_cpu_abi(void) { return MOESTRO_ABI; }

int64_t moestro_cpu_workspace(const MoestroLayer* layer, const MoestroTactic* tactic, int64_t tokens) {
  if (!kernels_of(*layer)) return 0;
  Plan plan;
  return plan.place(nullptr, *layer, *tactic, Sizes(*layer, *tactic, tokens));
}

int32_t moestro_cpu_moe(const MoestroLayer* layer, const MoestroTactic* tactic, const MoestroCall* call) {
  if (!kernels_of(*layer)) return MOESTRO_NO_ISA;
  const Sizes sizes(*layer, *tactic, call->tokens);
  Plan plan;
  if (plan.place(call->workspace, *layer, *tactic, sizes) > call->workspace_bytes) return MOESTRO_SMALL_WORKSPACE;
  for (int64_t n = 0; n < call->tokens; n += sizes.wave) {
    const int64_t tokens = std::min(sizes.wave, call->tokens - n);
    plan.sort(*layer, *tactic, call->ids + n * layer->top_k, call->weights + n * layer->top_k, tokens);
    Wave(*layer, *tactic, sizes, plan, call->x, call->out, n, tokens).run();
  }
  return MOESTRO_OK;
}

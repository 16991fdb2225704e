// The functions of device/hopper.cuh and the products Mma<pairs> on a CPU, each as late or as early as the hardware may.
//
// Barriers are the eight bytes in shared memory that they have on the GPU: arrivals, bytes, the phase. Shared memory starts
// as NaN, and so becomes what a copy will write, from its issue until a draw says that it is done. Products of a warp run at
// a draw's choice when they are committed or when they are waited for, and read their operands and sums only then; each warp
// by itself, though all four of a group must issue the same ones. Copies read nothing but the tensors of the launch.
#pragma once
#include "cuda_on_cpu.h"

struct alignas(64) Map { u64 words[16]; };  // base, columns (bytes), rows, bytes from row to row, rows of a box

constexpr u32 SHARED_AT = 1024, SHARED_MOST = 227 * 1024;
alignas(1024) thread_local u8 memory[SHARED_MOST];  // a kernel's `extern __shared__`

namespace machine {

struct Barrier { u32 count : 15, phase : 1, pending : 16; int bytes; };
struct Copy { u32 to; const void* from; int size, bytes; };  // zeros behind `bytes`
struct Product {
  float* part;
  const u32* a;
  u64 b;
  bool go_on;
  u32 group, fenced;
  void (*run)(const Product (&of_lanes)[WARP]);
  bool is(const Product& other) const { return b == other.b && go_on == other.go_on && run == other.run; }
};
struct Thread {
  std::vector<Copy> copies;  // that no barrier waits for yet
  std::vector<Product> products;
  u32 groups = 0;  // of products
  u32 fenced = 0;  // the time of its last fence of the proxies
  bool begun = false;
};
struct Shared {
  u32 bytes;
  std::vector<Thread> threads;
  std::vector<std::vector<Product>> of_group;  // all products of four warps
  std::vector<u32> of_warp;                    // how many a warp has run
  u32 now = 0, copied[SHARED_MOST / 128] = {};  // when cp.async wrote to these 128 bytes last
};
thread_local Shared* shared;
thread_local std::vector<std::pair<u64, u64>> tensors;  // of the launch: from, to

DEV Thread& self() { return shared->threads[threadIdx.x]; }
DEV std::string named(u32 address) { return std::to_string(address - SHARED_AT); }

DEV u8* at(u32 address, u32 bytes, u32 alignment) {
  if (address < SHARED_AT || address + bytes > SHARED_AT + shared->bytes || address % alignment)
    fail("shared memory has no aligned " + std::to_string(bytes) + " bytes at " + named(address));
  return memory + (address - SHARED_AT);
}

DEV void reads(const void* from, u64 bytes, u32 alignment) {
  for (auto [first, end] : tensors)
    if ((u64)from >= first && (u64)from + bytes <= end && (u64)from % alignment == 0) return;
  fail("a copy of " + std::to_string(bytes) + " bytes is not aligned, or reads what is no tensor of the launch");
}

// --- barriers
DEV Barrier& barrier(u32 address) {
  Barrier& b = *(Barrier*)at(address, 8, 8);
  if (b.count == 0 || b.count > 1024 || b.pending > b.count) fail("there is no barrier at " + named(address));
  return b;
}

DEV void count(u32 address, int arrivals, int bytes) {
  Barrier& b = barrier(address);
  if ((int)b.pending < arrivals) fail("barrier " + named(address) + " counts fewer arrivals");
  b.pending -= arrivals, b.bytes += bytes;
  if (b.pending || b.bytes) return;
  b.phase ^= 1, b.pending = b.count;
  happen(&b);
}

DEV std::string told_of_barrier(const void* event, u32 parity) {
  const Barrier& b = *(const Barrier*)event;
  return "barrier " + std::to_string((const u8*)event - memory) + " to end phase " + std::to_string(parity) + " (" +
         std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) +
         " bytes are missing)";
}

// --- copies
DEV void copy_by_thread(u32 to, const void* from, int size, int bytes) {
  memset(at(to, size, size), 0xff, size);
  if (bytes) reads(from, bytes, size);
  self().copies.push_back({to, from, size, bytes});
}

// bytes to shared memory, done later by `copied`, which bar hears of.
template <typename F>
DEV void copy_later(u32 to, int bytes, u32 bar, F&& copied) {
  memset(at(to, bytes, 16), 0xff, bytes);
  barrier(bar);
  block->later.push_back([=] {
    copied();
    std::fill_n(shared->copied + (to - SHARED_AT) / 128, (bytes + 127) / 128, 0);
    count(bar, 0, -bytes);
  });
  pause_at_times();
}

DEV u8& swizzled(u32 address) { return memory[(address ^ (address >> 7 & 7) << 4) - SHARED_AT]; }

// --- products
DEV const float* of_e4m3() {
  static const auto table = [] {
    std::vector<float> t(256);
    for (int i = 0; i < 256; i++) {
      int exponent = i >> 3 & 15, mantissa = i & 7;
      float v = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
      t[i] = (i & 127) == 127 ? NAN : i & 128 ? -v : v;
    }
    return t;
  }();
  return table.data();
}

template <int W>
__attribute__((optimize("O3"), noinline)) void add_product(float* sums, const float* a, const float* b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < W; n++) sums[m * W + n] += a[m * 32 + k] * b[k * W + n];
}

// Of a warp: 16 rows, whose 32 columns are in registers of its lanes, times W pairs.
template <int W>
void run_product(const Product (&of_lanes)[WARP]) {
  static thread_local float a[16 * 32], b[32 * W], sums[16 * W];
  const float* value = of_e4m3();
  const Product& p = of_lanes[0];
  u32 first = ((u32)p.b & 0x3fff) * 16;
  if (p.b >> 62 != 1 || (p.b >> 32 & 0x3fff) != 64 || p.b >> 49 & 7) fail("an operand must be swizzled rows of 128 bytes");
  at(first, (W - 1) * 128 + 32, 16);
  for (int n = 0; n < W; n++) {
    u32 row = first + n * 128;
    if (shared->copied[(row - SHARED_AT) / 128] > p.fenced) fail("a product reads what cp.async wrote, and no fence between");
    for (int k = 0; k < 32; k++) b[k * W + n] = value[swizzled(row + k)];
  }
  auto of_sums = [](int lane, int i) { return (lane / 4 + i / 2 % 2 * 8) * W + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 16; i++)  // bytes of four registers
      a[(lane / 4 + i / 4 % 2 * 8) * 32 + i / 8 * 16 + lane % 4 * 4 + i % 4] = value[((const u8*)of_lanes[lane].a)[i]];
    for (int i = 0; i < W / 2; i++) sums[of_sums(lane, i)] = p.go_on ? of_lanes[lane].part[i] : 0;
  }
  add_product<W>(sums, a, b);
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < W / 2; i++) of_lanes[lane].part[i] = sums[of_sums(lane, i)];
}

// All of this warp's products but those of the `running` groups committed last.
DEV void run_products(u32 running) {
  meet(warp(), [=] {
    int warp = threadIdx.x / WARP;
    Thread* lanes = &shared->threads[warp * WARP];
    auto& of_group = shared->of_group[warp / 4];
    auto& ours = lanes[0].products;
    while (!ours.empty() && ours[0].group + running < lanes[0].groups) {
      Product of_lanes[WARP];
      u32 number = shared->of_warp[warp]++;
      if (number == of_group.size()) of_group.push_back(ours[0]);
      for (int i = 0; i < WARP; i++) {
        auto& products = lanes[i].products;
        if (lanes[i].groups != lanes[0].groups || products.empty() || !products[0].is(of_group[number]))
          fail("threads of a group differ in their products");
        of_lanes[i] = products[0];
        of_lanes[0].fenced = min(of_lanes[0].fenced, of_lanes[i].fenced);
        products.erase(products.begin());
      }
      of_lanes[0].run(of_lanes);
    }
  });
}

DEV void check_that_all_is_over() {
  for (const Thread& thread : shared->threads)
    if (!thread.copies.empty() || !thread.products.empty()) fail("a block ends, and its copies or products do not");
  for (size_t i = 0; i < shared->of_warp.size(); i++)
    if (shared->of_warp[i] != shared->of_group[i / 4].size()) fail("threads of a group differ in their products");
}

// --- a launch
struct Grid { Dim blocks; u32 threads, shared_bytes; u64 seed; };

template <typename P, typename... M, size_t... I>
void run_blocks(void (*kernel)(P, M...), const void* words, const Map* maps, const Grid& grid, std::index_sequence<I...>) {
  const Dim& n = gridDim = grid.blocks;
  blockDim = {grid.threads, 1, 1};
  for (u32 i = 0; i < n.x * n.y * n.z && last_error.empty(); i++) {
    blockIdx = {i % n.x, i / n.x % n.y, i / n.x / n.y};
    Shared made;
    shared = &made;
    made.bytes = grid.shared_bytes;
    made.threads.resize(grid.threads), made.of_warp.resize(grid.threads / WARP), made.of_group.resize(grid.threads / 128 + 1);
    memset(memory, 0xff, SHARED_MOST);
    run_block(grid.threads, grid.seed + i, [=] { kernel(*(const P*)words, maps[I]...); }, check_that_all_is_over);
  }
}

// "", or what is wrong.
template <typename P, typename... M>
const char* run(void (*kernel)(P, M...), const void* words, u32 num_words, const Map* maps, u32 num_maps, const u64* known,
                u32 num_known, const Grid& grid) {
  last_error = "";
  if (sizeof(P) != num_words * 8 || sizeof...(M) != num_maps) return "a kernel's arguments are not its parameters";
  tensors.clear();
  for (u32 i = 0; i < num_known; i++) tensors.push_back({known[2 * i], known[2 * i + 1]});
  run_blocks(kernel, words, maps, grid, std::index_sequence_for<M...>());
  return last_error.c_str();
}

}  // namespace machine

#define RUNS(kernel)                                                                                                     \
  extern "C" const char* run_kernel(const void* words, u32 num_words, const Map* maps, u32 num_maps, const u64* known,   \
                                    u32 num_known, const machine::Grid* grid) {                                          \
    return machine::run(kernel, words, num_words, maps, num_maps, known, num_known, *grid);                              \
  }

// --- programmatic launch, registers ----------------------------------------------------------------------------------
DEV void wait_for_previous() {}
DEV void launch_next() {}
template <int COUNT>
DEV void take_registers() {}
template <int COUNT>
DEV void leave_registers() {}
DEV void forget(u32&) {}

// --- barriers --------------------------------------------------------------------------------------------------------
DEV u32 shared_address(const void* p) { return (u32)((const u8*)p - memory) + SHARED_AT; }
DEV void init(u32 bar, int count) { *(machine::Barrier*)machine::at(bar, 8, 8) = {(u32)count, 0, (u32)count, 0}; }
DEV void publish_barriers() {}
DEV void arrive(u32 bar) {
  machine::count(bar, 1, 0);
  machine::pause_at_times();
}
DEV void expect(u32 bar, int bytes) {
  machine::count(bar, 1, bytes);
  machine::pause_at_times();
}
DEV void wait(u32 bar, u32 parity) {
  machine::Barrier& b = machine::barrier(bar);
  machine::pause_at_times();
  while (b.phase == parity) machine::wait_for(&b, machine::told_of_barrier, parity);
}
DEV void arrive_when_copied(u32 bar) {
  auto copies = std::move(machine::self().copies);
  machine::self().copies.clear();
  machine::barrier(bar);
  machine::block->later.push_back([=] {
    machine::shared->now++;
    for (const machine::Copy& c : copies) {
      u8* to = memory + (c.to - SHARED_AT);
      memset(to, 0, c.size), memcpy(to, c.from, c.bytes);
      machine::shared->copied[(c.to - SHARED_AT) / 128] = machine::shared->now;
    }
    machine::count(bar, 1, 0);
  });
  machine::pause_at_times();
}
DEV void fence_for_products() { machine::self().fenced = machine::shared->now; }

// --- copies, and shared memory to registers --------------------------------------------------------------------------
DEV void copy4(u32 to, const void* from) { machine::copy_by_thread(to, from, 4, 4); }
DEV void copy16(u32 to, const void* from, int bytes = 16) { machine::copy_by_thread(to, from, 16, bytes); }
DEV void copy_bytes(u32 to, const u8* from, int bytes, u32 bar) {
  machine::reads(from, bytes, 16);
  machine::copy_later(to, bytes, bar, [=] { memcpy(memory + (to - SHARED_AT), from, bytes); });
}
DEV void copy_box(u32 to, const Map* map, int column, int row, u32 bar) {
  auto [base, columns, rows, pitch, height] = std::tie(map->words[0], map->words[1], map->words[2], map->words[3], map->words[4]);
  if (to % 128) machine::fail("a swizzled box begins at a multiple of 128 bytes");
  machine::copy_later(to, height * 128, bar, [=, base = (const u8*)base, columns = columns, rows = rows, pitch = pitch, height = height] {
    for (u64 i = 0; i < height * 128; i++) {
      u64 c = column + i % 128, r = row + i / 128;
      machine::swizzled(to + i) = c < columns && r < rows ? base[r * pitch + c] : 0;
    }
  });
}
DEV void load16(u32 (&to)[4], u32 from) { memcpy(to, machine::at(from, 16, 16), 16); }
DEV u32 load2(u32 from) { return *(const u16*)machine::at(from, 2, 2); }

// --- bytes -----------------------------------------------------------------------------------------------------------
DEV u32 permute(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    r |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}
template <int TABLE>
DEV u32 logic(u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (TABLE >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
DEV u32 bf16(float value) {
  u32 bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEV u32 two_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }
DEV u32 e4m3(float value) {  // the nearest, ties to even, at most 448
  u32 sign = __float_as_uint(value) >> 24 & 128;
  float v = fabsf(value);
  if (v != v) return 0x7f;
  if (v >= 448) return sign | 0x7e;
  int exponent = max(ilogbf(v == 0 ? 1e-9f : v), -6);
  return sign + ((exponent + 6) << 3) + (u32)nearbyintf(ldexpf(v, 3 - exponent));  // 8 eighths carry into the exponent
}
DEV u16 two_e4m3(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
DEV float half_to_float(u16 h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float v = exponent == 31 ? (mantissa ? NAN : INFINITY) : ldexpf(exponent ? 1024 + mantissa : mantissa, max(exponent, 1) - 25);
  return h >> 15 ? -v : v;
}
DEV float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
DEV u32 transposed(u32 r) {
  return machine::exchanged(r, [](const u32* values, int lane) {
    auto of = [&](int row) { return values[row * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xffff; };
    return of(lane % 4 * 2) | of(lane % 4 * 2 + 1) << 16;
  });
}

// --- products --------------------------------------------------------------------------------------------------------
DEV void begin_products() { machine::self().begun = true; }
DEV void end_products() {
  machine::Thread& me = machine::self();
  me.begun = false;
  u64 drawn = machine::mixed(machine::block->seed ^ (u64)me.groups++ << 32 ^ threadIdx.x / 32);
  if (drawn % 4 == 0) machine::run_products(0);  // at once
}
DEV void wait_for_all_but_one() { machine::run_products(1); }
DEV u64 operand(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }

template <int W>
struct Mma {
  static void run(float* part, const u32* a, u64 b, bool go_on) {
    machine::Thread& me = machine::self();
    if (!me.begun) machine::fail("products begin without a fence of the registers");
    me.products.push_back({part, a, b, go_on, me.groups, me.fenced, machine::run_product<W>});
  }
  static void wait(float*) { machine::run_products(0); }
};

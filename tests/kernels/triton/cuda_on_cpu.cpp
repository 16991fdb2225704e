// The functions of cuda_on_cpu.h: barriers, copies and products in shared memory, each as late or as early as may be.
//
// Barriers are the eight bytes in shared memory that they have on the GPU. Shared memory starts as NaN, and so becomes what
// a copy will write, from its issue until a draw says that it is done. A warp's products run, at a draw's choice, when they
// are committed or not before they are waited for, and read operands and sums only then; each warp by itself, though the
// four of a group must issue the same ones. Copies read nothing but the tensors of the launch.
#include "fibers_on_cpu.h"

constexpr u32 SHARED_AT = 1024, SHARED_MOST = 227 * 1024;  // the GPU's own are the first 1024 bytes
alignas(1024) thread_local u8 memory[SHARED_MOST];         // a kernel's `extern __shared__`

struct Barrier { u32 count : 15, phase : 1, pending : 16; int bytes; };
struct Copy { u32 to; const void* from; int size, bytes; };  // zeros behind `bytes`
struct Product {
  float* part;
  const u32* a;
  u64 b;
  bool go_on;
  int pairs;
  u32 group, fenced;
  bool is(const Product& other) const { return b == other.b && go_on == other.go_on && pairs == other.pairs; }
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
static thread_local Shared* shared;
static thread_local const Launch* current;

static Thread& self() { return shared->threads[threadIdx.x]; }
static std::string named(u32 address) { return std::to_string(address - SHARED_AT); }

static u8* at(u32 address, u32 bytes, u32 alignment) {
  if (address < SHARED_AT || address + bytes > SHARED_AT + shared->bytes || address % alignment)
    fail("shared memory has no aligned " + std::to_string(bytes) + " bytes at " + named(address));
  return memory + (address - SHARED_AT);
}

static void check_source(const void* from, u64 bytes, u32 alignment) {
  for (u64 i = 0; i < current->num_tensors; i++)
    if ((u64)from >= current->tensors[2 * i] && (u64)from + bytes <= current->tensors[2 * i + 1])
      if ((u64)from % alignment == 0) return;
  fail("a copy of " + std::to_string(bytes) + " bytes is not aligned, or reads what is no tensor of the launch");
}

// --- barriers --------------------------------------------------------------------------------------------------------
static Barrier& barrier(u32 address) {
  Barrier& b = *(Barrier*)at(address, 8, 8);
  if (b.count == 0 || b.count > 1024 || b.pending > b.count) fail("there is no barrier at " + named(address));
  return b;
}

static void count(u32 address, int arrivals, int bytes) {
  Barrier& b = barrier(address);
  if ((int)b.pending < arrivals) fail("barrier " + named(address) + " counts fewer arrivals");
  b.pending -= arrivals, b.bytes += bytes;
  if (b.pending || b.bytes) return;
  b.phase ^= 1, b.pending = b.count;
  happen(&b);
}

static std::string told_of_barrier(const void* event, u32 parity) {
  const Barrier& b = *(const Barrier*)event;
  return "barrier " + std::to_string((const u8*)event - memory) + " to end phase " + std::to_string(parity) + " (" +
         std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) +
         " bytes are missing)";
}

u32 shared_address(const void* p) { return (u32)((const u8*)p - memory) + SHARED_AT; }
void init(u32 bar, int count) { *(Barrier*)at(bar, 8, 8) = {(u32)count, 0, (u32)count, 0}; }
void arrive(u32 bar) {
  count(bar, 1, 0);
  pause_at_times();
}
void expect(u32 bar, int bytes) {
  count(bar, 1, bytes);
  pause_at_times();
}
void wait(u32 bar, u32 parity) {
  Barrier& b = barrier(bar);
  pause_at_times();
  while (b.phase == parity) wait_for(&b, told_of_barrier, parity);
}

// --- copies ----------------------------------------------------------------------------------------------------------
static void copy_by_thread(u32 to, const void* from, int size, int bytes) {
  memset(at(to, size, size), 0xff, size);
  if (bytes) check_source(from, bytes, size);
  self().copies.push_back({to, from, size, bytes});
}

void copy4(u32 to, const void* from) { copy_by_thread(to, from, 4, 4); }
void copy16(u32 to, const void* from, int bytes) { copy_by_thread(to, from, 16, bytes); }

void arrive_when_copied(u32 bar) {
  auto copies = std::move(self().copies);
  self().copies.clear();
  barrier(bar);
  block->later.push_back([=] {
    shared->now++;
    for (const Copy& c : copies) {
      u8* to = memory + (c.to - SHARED_AT);
      memset(to, 0, c.size), memcpy(to, c.from, c.bytes);
      shared->copied[(c.to - SHARED_AT) / 128] = shared->now;
    }
    count(bar, 1, 0);
  });
  pause_at_times();
}

void fence_for_products() { self().fenced = shared->now; }

// Bytes to shared memory that `copied` writes later, and the barrier hears of.
template <typename F>
static void copy_later(u32 to, int bytes, u32 bar, F&& copied) {
  memset(at(to, bytes, 16), 0xff, bytes);
  barrier(bar);
  block->later.push_back([=] {
    copied();
    std::fill_n(shared->copied + (to - SHARED_AT) / 128, (bytes + 127) / 128, 0);
    count(bar, 0, -bytes);
  });
  pause_at_times();
}

static u8& swizzled(u32 address) { return memory[(address ^ (address >> 7 & 7) << 4) - SHARED_AT]; }

void copy_bytes(u32 to, const u8* from, int bytes, u32 bar) {
  check_source(from, bytes, 16);
  copy_later(to, bytes, bar, [=] { memcpy(memory + (to - SHARED_AT), from, bytes); });
}

void copy_box(u32 to, const Map* of, int column, int row, u32 bar) {
  if (to % 128) fail("a swizzled box begins at a multiple of 128 bytes");
  copy_later(to, of->height * 128, bar, [=, map = *of] {
    for (u64 i = 0; i < map.height * 128; i++) {
      u64 c = column + i % 128, r = row + i / 128;
      swizzled(to + i) = c < map.columns && r < map.rows ? ((const u8*)map.base)[r * map.pitch + c] : 0;
    }
  });
}

void load16(u32 (&to)[4], u32 from) { memcpy(to, at(from, 16, 16), 16); }
u32 load2(u32 from) { return *(const u16*)at(from, 2, 2); }

// --- products --------------------------------------------------------------------------------------------------------
static const float* of_e4m3() {
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

// Of a warp: 16 rows, whose 32 columns are in registers of its lanes, times W pairs.
static void run_product(const Product (&of_lanes)[WARP]) {
  constexpr int MOST = 256;
  static thread_local float a[16 * 32], b[32 * MOST], sums[16 * MOST];
  const float* value = of_e4m3();
  const Product& p = of_lanes[0];
  const int W = p.pairs;
  u32 first = ((u32)p.b & 0x3fff) * 16;
  if (p.b >> 62 != 1 || (p.b >> 32 & 0x3fff) != 64 || p.b >> 49 & 7) fail("an operand must be swizzled rows of 128 bytes");
  at(first, (W - 1) * 128 + 32, 16);
  for (int n = 0; n < W; n++) {
    u32 row = first + n * 128;
    if (shared->copied[(row - SHARED_AT) / 128] > p.fenced) fail("a product reads what cp.async wrote, and no fence between");
    for (int k = 0; k < 32; k++) b[k * W + n] = value[swizzled(row + k)];
  }
  auto of_sums = [=](int lane, int i) { return (lane / 4 + i / 2 % 2 * 8) * W + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 16; i++)  // bytes of four registers
      a[(lane / 4 + i / 4 % 2 * 8) * 32 + i / 8 * 16 + lane % 4 * 4 + i % 4] = value[((const u8*)of_lanes[lane].a)[i]];
    for (int i = 0; i < W / 2; i++) sums[of_sums(lane, i)] = p.go_on ? of_lanes[lane].part[i] : 0;
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < W; n++) sums[m * W + n] += a[m * 32 + k] * b[k * W + n];
  for (int lane = 0; lane < WARP; lane++)
    for (int i = 0; i < W / 2; i++) of_lanes[lane].part[i] = sums[of_sums(lane, i)];
}

// All of this warp's products but those of the `running` groups committed last.
static void run_products(u32 running) {
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
      run_product(of_lanes);
    }
  });
}

void begin_products() { self().begun = true; }
void end_products() {
  Thread& me = self();
  me.begun = false;
  u64 drawn = mixed(block->seed ^ (u64)me.groups++ << 32 ^ threadIdx.x / WARP);  // the same for a warp
  if (drawn % 4 == 0) run_products(0);                                           // at once
}
void wait_for_all_but_one() { run_products(1); }
void wait_for_products() { run_products(0); }
void multiply_later(float* part, const u32* a, u64 b, bool go_on, int pairs) {
  Thread& me = self();
  if (!me.begun) fail("products begin without a fence of the registers");
  me.products.push_back({part, a, b, go_on, pairs, me.groups, me.fenced});
}

// --- what threads do together ----------------------------------------------------------------------------------------
void __trap() { fail("trap"); }
void __syncthreads() {
  meet(block->all, [] {});
}
u32 __shfl_xor_sync(u32, u32 value, int bits) {
  return exchanged(value, [=](const u32* values, int lane) { return values[lane ^ bits]; });
}
u32 transposed(u32 r) {
  return exchanged(r, [](const u32* values, int lane) {
    auto of = [&](int row) { return values[row * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xffff; };
    return of(lane % 4 * 2) | of(lane % 4 * 2 + 1) << 16;
  });
}

// --- a launch --------------------------------------------------------------------------------------------------------
static void check_that_all_is_over() {
  for (const Thread& thread : shared->threads)
    if (!thread.copies.empty() || !thread.products.empty()) fail("a block ends, and its copies or products do not");
  for (size_t i = 0; i < shared->of_warp.size(); i++)
    if (shared->of_warp[i] != shared->of_group[i / 4].size()) fail("threads of a group differ in their products");
}

const char* run_grid(const Launch& launch, void (*kernel)(const Launch&)) {
  static thread_local std::string said;
  current = &launch, said = "";
  gridDim = {(u32)launch.grid[0], (u32)launch.grid[1], (u32)launch.grid[2]};
  blockDim = {(u32)launch.threads, 1, 1};
  for (u32 i = 0; i < gridDim.x * gridDim.y * gridDim.z && said.empty(); i++) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    Shared made;
    shared = &made, made.bytes = launch.shared_bytes;
    made.threads.resize(blockDim.x), made.of_warp.resize(blockDim.x / WARP), made.of_group.resize(blockDim.x / 128 + 1);
    memset(memory, 0xff, SHARED_MOST);
    said = run_block(blockDim.x, launch.seed + i, [&] { kernel(launch); }, check_that_all_is_over);
  }
  stacks.reset();  // each library has its own
  return said.c_str();
}

// The functions of cuda_on_cpu.h: barriers, copies and products in shared memory, each as late or as early as may be.
//
// Barriers are the eight bytes in shared memory that they have on the GPU. Shared memory starts as NaN, and so becomes what
// a copy will write, from its issue until a draw says that it is done. A warp's products run, at a draw's choice, when they
// are committed or not before they are waited for, and read operands and sums only then; each warp by itself, though the
// four of a group must issue the same ones. Copies read nothing but the tensors of the launch.
#include "fibers_on_cpu.h"

constexpr u32 SHARED_AT = 1024, SHARED_MOST = 227 * 1024;  // the GPU's own are the first 1024 bytes
constexpr u32 CLUSTER_MOST = 2;
alignas(1024) static thread_local u8 memories[CLUSTER_MOST][SHARED_MOST];

struct Barrier { u32 count : 15, phase : 1, pending : 16; int bytes; };
struct Copy { u32 to; const void* from; int size, bytes; };  // zeros behind `bytes`
struct Out { void* to; u32 from; int bytes; };
struct Product {
  float* part;
  const u32* a;
  u64 of_a, b;
  bool go_on;
  int pairs;
  u32 group, fenced;
  bool is(const Product& other) const { return of_a == other.of_a && b == other.b && go_on == other.go_on && pairs == other.pairs; }
};
struct Thread {
  std::vector<Copy> copies;  // that no barrier waits for yet
  std::vector<Out> outs;     // copies to memory, which read as late as may be
  std::vector<u32> written;  // 16 bytes each, since its last fence of the proxies
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
  u32 now = 0, copied[CLUSTER_MOST][SHARED_MOST / 128] = {};  // when cp.async wrote to these 128 bytes last
};
static thread_local Shared* shared;
static thread_local const Launch* current;

static Thread& self() { return shared->threads[block->running]; }
static u8& byte_at(u32 address) { return memories[rank][address - SHARED_AT]; }  // of this block; later ones set `rank`
static u32& copied_at(u32 address) { return shared->copied[rank][(address - SHARED_AT) / 128]; }
static std::string named(u32 address) { return std::to_string(address - SHARED_AT); }

static u8* at(u32 address, u32 bytes, u32 alignment) {
  if (address < SHARED_AT || address + bytes > SHARED_AT + shared->bytes || address % alignment)
    fail("shared memory has no aligned " + std::to_string(bytes) + " bytes at " + named(address));
  return &byte_at(address);
}

static void check_source(const void* from, u64 bytes, u32 alignment) {
  for (u64 i = 0; i < current->num_tensors; i++)
    if ((u64)from >= current->tensors[2 * i] && (u64)from + bytes <= current->tensors[2 * i + 1])
      if ((u64)from % alignment == 0) return;
  fail("a copy of " + std::to_string(bytes) + " bytes is not aligned, or reads what is no tensor of the launch");
}

// The block whose memory something comes to.
static void check_that_it_goes_on() {
  auto first = block->fibers.begin() + rank * blockDim.x;
  if (std::all_of(first, first + blockDim.x, [](const Fiber& fiber) { return fiber.over; }))
    fail("something comes to the memory of a block that has ended");
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
  return "barrier " + std::to_string(((const u8*)event - memories[0]) % SHARED_MOST) + " to end phase " + std::to_string(parity) + " (" +
         std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) +
         " bytes are missing)";
}

u8* shared_memory() { return memories[rank]; }
u32 shared_address(const void* p) { return (u32)((const u8*)p - memories[rank]) + SHARED_AT; }
void init(u32 bar, int count) { *(Barrier*)at(bar, 8, 8) = {(u32)count, 0, (u32)count, 0}; }
void arrive(u32 bar) {
  count(bar, 1, 0);
  pause_at_times();
}
void expect(u32 bar, int bytes) {
  count(bar, 1, bytes);
  pause_at_times();
}
void arrive_at(u32 bar, u32 other) {
  std::swap(rank, other);
  check_that_it_goes_on();
  count(bar, 1, 0);
  std::swap(rank, other);
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
  block->later.push_back([=, ours = rank] {
    rank = ours;
    shared->now++;
    for (const Copy& c : copies) {
      u8* to = &byte_at(c.to);
      memset(to, 0, c.size), memcpy(to, c.from, c.bytes);
      copied_at(c.to) = shared->now;
    }
    count(bar, 1, 0);
  });
  pause_at_times();
}

void fence_for_products() {
  self().fenced = shared->now;
  self().written.clear();
}

void store16(u32 to, const u32 (&r)[4]) {
  memcpy(at(to, 16, 16), r, 16);
  self().written.push_back(to);
}
void copy_out(void* to, u32 from, int bytes) {
  check_source(to, bytes, 16);
  if (bytes % 16) fail("multiples of 16 bytes are copied");
  at(from, bytes, 16);
  for (const Thread& thread : shared->threads)
    for (u32 address : thread.written)
      if (address >= from && address < from + bytes) fail("a copy reads what a thread wrote, and no fence between");
  self().outs.push_back({to, from, bytes});
}
void wait_for_copies_out() {
  for (const Out& out : self().outs) memcpy(out.to, &byte_at(out.from), out.bytes);
  self().outs.clear();
}

// Bytes to a block's shared memory that `copied` writes later, and its barrier hears of.
template <typename F>
static void copy_later(u32 to, int bytes, u32 bar, u32 block_of, F&& copied) {
  std::swap(rank, block_of);
  check_that_it_goes_on();
  memset(at(to, bytes, 16), 0xff, bytes);
  barrier(bar);
  block->later.push_back([=, theirs = rank] {
    rank = theirs;
    check_that_it_goes_on();
    copied();
    for (int i = 0; i < bytes; i += 128) copied_at(to + i) = 0;
    count(bar, 0, -bytes);
  });
  std::swap(rank, block_of);
}

static u8& swizzled(u32 address) { return byte_at(address ^ (address >> 7 & 7) << 4); }

void copy_bytes(u32 to, const u8* from, int bytes, u32 bar) {
  check_source(from, bytes, 16);
  copy_later(to, bytes, bar, rank, [=] { memcpy(&byte_at(to), from, bytes); });
  pause_at_times();
}

void copy_box_to(u32 to, const Map* of, int column, int row, u32 bar, u16 mask) {
  if (to % 128) fail("a box begins at a multiple of 128 bytes");
  if (column * of->size % 16) fail("a box is read from a multiple of 16 bytes of its rows");
  if (mask >> block->blocks.size()) fail("a copy to a block that the cluster does not have");
  for (u32 i = 0; i < block->blocks.size(); i++) {
    if (!(mask >> i & 1)) continue;
    copy_later(to, of->height * of->width, bar, i, [=, map = *of] {
      for (u64 i = 0; i < map.height * map.width; i++) {
        u64 c = column * map.size + i % map.width, r = row + i / map.width;
        u8& byte = map.swizzle ? swizzled(to + i) : byte_at(to + i);
        byte = c < map.columns && r < map.rows ? ((const u8*)map.base)[r * map.pitch + c] : 0;
      }
    });
  }
  pause_at_times();
}
void copy_box(u32 to, const Map* of, int column, int row, u32 bar) { copy_box_to(to, of, column, row, bar, 1 << rank); }

void load16(u32 (&to)[4], u32 from) { memcpy(to, at(from, 16, 16), 16); }
u32 load1(u32 from) { return *(const u8*)at(from, 1, 1); }
u32 load2(u32 from) { return *(const u16*)at(from, 2, 2); }
u32 load4(u32 from) { return *(const u32*)at(from, 4, 4); }
float load_float(u32 from) { return *(const float*)at(from, 4, 4); }
void store_float(u32 to, float value) { *(float*)at(to, 4, 4) = value; }

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

// 32 columns of a row of an operand in shared memory.
static void read_operand(u64 operand, u32 row, u32 fenced, float* to, int step) {
  if (operand >> 62 != 1 || (operand >> 32 & 0x3fff) != 64 || operand >> 49 & 7) fail("an operand must be swizzled rows of 128 bytes");
  u32 from = ((u32)operand & 0x3fff) * 16 + row * 128;
  at(from, 32, 16);
  if (copied_at(from) > fenced) fail("a product reads what cp.async wrote, and no fence between");
  for (int k = 0; k < 32; k++) to[k * step] = of_e4m3()[swizzled(from + k)];
}

// Of a warp: 16 rows, whose 32 columns are in registers of its lanes or in shared memory, times W others.
static void run_product(const Product (&of_lanes)[WARP], int warp) {
  constexpr int MOST = 256;
  static thread_local float a[16 * 32], b[32 * MOST], sums[16 * MOST];
  const float* value = of_e4m3();
  const Product& p = of_lanes[0];
  const int W = p.pairs;
  for (int n = 0; n < W; n++) read_operand(p.b, n, p.fenced, b + n, W);
  for (int m = 0; m < 16 && !p.a; m++) read_operand(p.of_a, warp % 4 * 16 + m, p.fenced, a + m * 32, 1);
  auto of_sums = [=](int lane, int i) { return (lane / 4 + i / 2 % 2 * 8) * W + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 16 && p.a; i++)  // bytes of four registers
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
    int warp = block->running / WARP;
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
      run_product(of_lanes, warp);
    }
  });
}

void begin_products() { self().begun = true; }
void end_products() {
  Thread& me = self();
  me.begun = false;
  u64 drawn = mixed(block->seed ^ (u64)me.groups++ << 32 ^ block->running / WARP);  // the same for a warp
  if (drawn % 4 == 0) run_products(0);                                           // at once
}
void wait_for_all_but_one() { run_products(1); }
void wait_for_products() { run_products(0); }
void multiply_later(float* part, const u32* a, u64 of_a, u64 b, bool go_on, int pairs) {
  Thread& me = self();
  if (!me.begun) fail("products begin without a fence of the registers");
  me.products.push_back({part, a, of_a, b, go_on, pairs, me.groups, me.fenced});
}

// --- what threads do together ----------------------------------------------------------------------------------------
void __trap() { fail("trap"); }
void __syncthreads() {
  meet(block->blocks[rank], [] {});
}
void meet_first(int count) {
  block->firsts[rank].size = count;
  meet(block->firsts[rank], [] {});
}
void __syncwarp() {
  meet(warp(), [] {});
}
void sync_cluster() {
  meet(block->all, [] {});
}
int rank_in_cluster() { return rank; }
u32 __shfl_xor_sync(u32, u32 value, int bits) {
  return exchanged(value, [=](const u32* values, int lane) { return values[lane ^ bits]; });
}
static u32 transposed(u32 r) {
  return exchanged(r, [](const u32* values, int lane) {
    auto of = [&](int row) { return values[row * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xffff; };
    return of(lane % 4 * 2) | of(lane % 4 * 2 + 1) << 16;
  });
}

static void store_matrix(u32 to, int number, u32 value) {  // a row of it to the address of each of eight lanes
  u32 row = exchanged(to, [=](const u32* values, int lane) { return values[8 * number + lane / 4]; });
  *(u32*)(at(row, 16, 16) + threadIdx.x % 4 * 4) = value;
}
void store_matrices(u32 to, const u32 (&r)[4]) {
  for (int i = 0; i < 4; i++) store_matrix(to, i, r[i]);
}
void store_turned(u32 to, u32 first, u32 second) {
  store_matrix(to, 0, transposed(first));
  store_matrix(to, 1, transposed(second));
}

// --- a launch --------------------------------------------------------------------------------------------------------
static void check_that_all_is_over() {
  for (const Thread& thread : shared->threads)
    if (!thread.copies.empty() || !thread.outs.empty() || !thread.products.empty()) fail("a block ends, and its copies or products do not");
  for (size_t i = 0; i < shared->of_warp.size(); i++)
    if (shared->of_warp[i] != shared->of_group[i / 4].size()) fail("threads of a group differ in their products");
}

const char* run_grid(const Launch& launch, void (*kernel)(const Launch&)) {
  static thread_local std::string said;
  current = &launch, said = "";
  gridDim = {(u32)launch.grid[0], (u32)launch.grid[1], (u32)launch.grid[2]};
  blockDim = {(u32)launch.threads, 1, 1};
  u32 cluster = launch.cluster;
  if (cluster < 1 || cluster > CLUSTER_MOST || gridDim.x % cluster) said = "the grid has no whole clusters";
  for (u32 i = 0; i < gridDim.x * gridDim.y * gridDim.z && said.empty(); i += cluster) {
    blockIdx = {0, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    first_block = i % gridDim.x;
    Shared made;
    u32 threads = cluster * blockDim.x;
    shared = &made, made.bytes = launch.shared_bytes;
    made.threads.resize(threads), made.of_warp.resize(threads / WARP), made.of_group.resize(threads / 128 + 1);
    memset(memories, 0xff, sizeof memories);
    said = run_cluster(cluster, launch.seed + i, [&] { kernel(launch); }, check_that_all_is_over);
  }
  stacks.reset();  // each library has its own
  return said.c_str();
}

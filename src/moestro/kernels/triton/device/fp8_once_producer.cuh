// fp8_once's arguments, what lies where in shared memory, and the producer: it copies the operands of tiles, and tells of them.
struct Params {
  const float* scales;  // of weights: [L, SCALE_ROWS, BLOCKS]
  const BIAS* bias;
  const int *sorted_pairs, *table;
  void* out;  // of the first product e4m3 [places, OUT_STRIDE], of the second bfloat16 [pairs, OUT_STRIDE]
  float* out_scale;  // of the first [places, out_blocks]
  i64 stride, out_blocks;
};
struct Maps { const Map *x, *x_scale, *w; };  // boxes of 64 rows, of four scales of 128 rows, of 128 rows

constexpr int GROUPS = 2, HALF = 128, TILE_ROWS = 256, TILE_PAIRS = GROUPS * 64;
constexpr int X_GROUP = 64 * 128, X_STAGE = GROUPS * X_GROUP, W_HALF = HALF * 128, W_STAGE = TILE_ROWS * 128;
constexpr int FOUR = 4, OF_W = X_STAGE, OF_SCALES = X_STAGE + W_STAGE, S_STAGE = TILE_PAIRS * FOUR * 4;
constexpr int STAGE = OF_SCALES + S_STAGE;  // a multiple of 1024, where swizzled rows begin
constexpr int STRIPS = (KERNEL_ROWS + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS);  // of a cluster
constexpr int SLOTS = 2;  // of tiles told of: both groups are in the tile before when the next one's first stage is empty
// A slot has the pairs of a tile's places, and two scales of weights for each block of columns.
constexpr int OF_PAIRS = 0, OF_W_SCALES = TILE_PAIRS * 4, OF_TILE = OF_W_SCALES + BLOCKS * 8;
constexpr int SLOT = (OF_TILE + 16 + 15) / 16 * 16;
constexpr int COPIERS = 32;
constexpr int RING = STAGES * STAGE, BARRIERS = RING + SLOTS * SLOT, BYTES = BARRIERS + 8 * (2 * STAGES + SLOTS);
constexpr int TURN = (BYTES + 127) / 128 * 128, TURNED = 2048;  // bytes of each warp: 16 pairs x 64 rows of results
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS;
static_assert(TURN + GROUPS * 4 * TURNED <= SHARED_BYTES, "shared memory");

DEV int group_of_thread() { return threadIdx.x / 128; }

struct Ring { u32 data, slots, full, empty, told; };  // addresses: stages, tiles, and the barriers of both

// How often each stage was used, modulo two. A tile begins with the first.
struct Uses {
  u32 odd;
  __device__ __forceinline__ u32 parity(int stage) const { return odd >> stage & 1; }
  __device__ __forceinline__ void add(int stage) { odd ^= 1u << stage; }
};

// --- the producer --------------------------------------------------------------------------------------------------
// The rows of scales of a tile's two kinds of rows: gate and up, or its first and second half.
DEV int scale_row(const Tile& t, int kind) {
  if (GATED) return min(t.strip, SCALE_ROWS / 2 - 1) + kind * (SCALE_ROWS / 2);
  return min(2 * t.strip + kind, SCALE_ROWS - 1);
}

DEV void tell(const Params& p, const Ring& ring, const Tile& t, int slot, u8* slots, int thread) {
  u32 to = ring.slots + slot * SLOT, bar = ring.told + 8 * slot;
#pragma unroll 1
  for (int i = thread; i < 2 * BLOCKS; i += COPIERS)
    copy4(to + OF_W_SCALES + 4 * i, p.scales + (i64)(t.expert * SCALE_ROWS + scale_row(t, i % 2)) * BLOCKS + i / 2);
  if constexpr (PRODUCT == 2) {
#pragma unroll 1
    for (int i = thread; i < min(t.count, TILE_PAIRS); i += COPIERS) copy4(to + OF_PAIRS + 4 * i, p.sorted_pairs + t.start + i);
  }
  arrive_when_copied(bar);
  if (thread == 0) {
    *(Tile*)(slots + slot * SLOT + OF_TILE) = t;
    arrive(bar);
  }
}

// Rows of x and of weights behind a tile's last are another's, or zeros, and what becomes of them is not written.
DEV void copy_stage(const Maps& maps, const Tile& t, u32 stage, u32 bar, int b, int rank) {
  int groups = t.count > 64 ? 2 : t.count > 0;
  expect(bar, groups * X_GROUP + W_STAGE + S_STAGE);
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if (g >= groups) continue;
    u32 to = stage + g * X_GROUP;
    if (CLUSTER == 1) copy_box(to, maps.x, b * 128, t.start + 64 * g, bar);
    else if (g == rank) copy_box_to(to, maps.x, b * 128, t.start + 64 * g, bar, 3);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 to = stage + OF_W + h * W_HALF;
    int row = t.expert * KERNEL_ROWS + t.strip * TILE_ROWS + h * HALF;
    copy_box(to, maps.w, b * 128, row, bar);
  }
  copy_box(stage + OF_SCALES, maps.x_scale, b / FOUR * FOUR, t.start, bar);
}

DEV void fill(const Params& p, const Maps& maps, const Ring& ring, const Tile& t, int slot, u8* slots, Uses& uses, int thread, int rank) {
  wait(ring.empty, uses.parity(0) ^ 1);
  tell(p, ring, t, slot, slots, thread);
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b++) {
    int stage = b % STAGES;
    wait(ring.empty + 8 * stage, uses.parity(stage) ^ 1);
    __syncwarp();  // before a copy lets the barrier turn again: none falls behind by two of its phases
    if (thread == 0) copy_stage(maps, t, ring.data + stage * STAGE, ring.full + 8 * stage, b, rank);
    uses.add(stage);
  }
}

DEV void produce(const Params& p, const Maps& maps, const Ring& ring, u8* slots, int thread) {
  Uses uses = {0};
  int rank = CLUSTER > 1 ? rank_in_cluster() : 0, programs = gridDim.x / CLUSTER;
  int slot = 0, tiles = p.table[3 * p.stride], total = total_of(tiles * STRIPS, programs);
  for (int number = blockIdx.x / CLUSTER; number < total; number += programs) {
    Tile t = tile_of<STRIPS>(p.table, p.stride, tiles, number, programs);
    if (t.count <= 0) continue;
    t.strip = CLUSTER * t.strip + rank;
    fill(p, maps, ring, t, slot, slots, uses, thread, rank);
    if (++slot == SLOTS) slot = 0;
  }
  wait(ring.empty, uses.parity(0) ^ 1);
  if (thread == 0) {
    *(Tile*)(slots + slot * SLOT + OF_TILE) = Tile{0, 0, 0, -1};
    arrive(ring.told + 8 * slot);
  }
  arrive(ring.told + 8 * slot);
}

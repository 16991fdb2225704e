// e4m3 rows and e4m3 weights in blocks of 128 x 128, as they lie in memory, on Hopper's FP8 tensor cores: pairs are a wgmma's
// A operand, weights its B operand.
//
// A producer fills a ring of stages, 128 columns each; two groups of four warps multiply 64 pairs each with the same 256 rows
// of weights, 128 at a time: two such sums and one product are 192 registers. Hopper's FP8 products keep about 14 bits of the
// sums they add to, so each is added in float32, times the scale of its row of x and of its weights (DeepSeek-V3's recipe),
// while the other group's keeps the tensor core busy. A tile of 64 pairs at most has each group multiply half of the rows.
// The tensor memory accelerator copies scales of rows with their values, four blocks' at a time, its least; the first product's
// end quantises the intermediate, with a scale for each row's 128 columns.
//
// Two programs of a CLUSTER have two strips of weights of the same pairs: each copies half of the rows of x to both, and a stage
// is empty once both have given it back.
//
// Constants: paths/fp8_once_cuda.py.

DEV Tile tile_in(u32 slot) {
  u32 at = slot + OF_TILE;
  return {(int)load4(at), (int)load4(at + 4), (int)load4(at + 8), (int)load4(at + 12)};
}

// A stage that this warp has read, to all that write to it.
DEV void give_back(const Ring& ring, int stage) {
  u32 lane = threadIdx.x % 32, bar = ring.empty + 8 * stage;
  if (CLUSTER > 1) {
    if (lane < CLUSTER) arrive_at(bar, lane);
  } else {
    if (lane == 0) arrive(bar);
  }
}

// --- sums ------------------------------------------------------------------------------------------------------------
// Of a block of columns: for rows 0..7 and 8..15 of pairs, for gate and up, or both halves of the rows of weights.
struct Scales {
  float s[2][2];
  // second: whether the one half there is, is the second.
  __device__ __forceinline__ void read(u32 of_x, u32 of_w, bool second) {
    float x0 = load_float(of_x), x1 = load_float(of_x + 8 * FOUR * 4), w0 = load_float(of_w), w1 = load_float(of_w + 4);
    if (!GATED && second) w0 = w1;
    s[0][0] = x0 * w0, s[0][1] = x0 * w1, s[1][0] = x1 * w0, s[1][1] = x1 * w1;
  }
};

// What a group has of a tile: 64 pairs and both halves of the rows; or one half, of a tile that has no more pairs.
template <int COUNT>
struct Part {
  static constexpr int HALVES = COUNT;
  static __device__ __forceinline__ int first_half() { return COUNT == 2 ? 0 : group_of_thread(); }
  static __device__ __forceinline__ int first_pair() { return COUNT == 2 ? group_of_thread() * 64 : 0; }
  float sum[HALVES][HALF / 2], part[HALF / 2];  // of each half, and the product of one

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < HALF / 2; i++) {
      part[i] = 0.f;
#pragma unroll
      for (int h = 0; h < HALVES; h++) sum[h][i] = 0.f;
    }
  }
  __device__ __forceinline__ void multiply(u32 rows_of_x, u32 rows_of_w) {
    u64 x = operand(rows_of_x), w = operand(rows_of_w);
    begin_products();
    Mma<HALF>::run(part, x, w, false);
    Mma<HALF>::run(part, x + 2, w + 2, true);
    Mma<HALF>::run(part, x + 4, w + 4, true);
    Mma<HALF>::run(part, x + 6, w + 6, true);
    end_products();
  }
  template <int H>
  __device__ __forceinline__ void add(const Scales& by) {
#pragma unroll
    for (int i = 0; i < HALF / 8; i++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        sum[H][4 * i + k] = fmaf(part[4 * i + k], by.s[k / 2][GATED ? i % 2 : H], sum[H][4 * i + k]);
  }
};

// --- the groups that multiply ------------------------------------------------------------------------------------------
// One stage. What a group waits for is asked while its last product runs: between products are additions alone. GROUP is this
// one, or any: known, and the stage is known too, what leads to an operand's address is the same for all threads.
constexpr int ANY = -1;
template <int GROUP, typename P>
DEV void multiply_stage(P& v, const Ring& ring, Scales& now, Uses& uses, int s, u32 scales, u32 of_w, int b, bool more) {
  u32 stage = ring.data + s * STAGE, x = stage + (GROUP == ANY ? 0 : GROUP * X_GROUP);
  u32 w = stage + OF_W + (P::HALVES == 1 ? v.first_half() * W_HALF : 0);
  int after = (s + 1) % STAGES;
  Scales next;
  v.multiply(x, w);
  if constexpr (P::HALVES == 2) {
    Mma<HALF>::wait(v.part);
    v.template add<0>(now);
    v.multiply(x, w + W_HALF);
  }
  uses.add(s);
  if (more) {
    wait(ring.full + 8 * after, uses.parity(after));
    next.read(ring.data + after * STAGE + scales + (b + 1) % FOUR * 4, of_w + 8 * (b + 1), P::HALVES == 1 && v.first_half());
  }
  Mma<HALF>::wait(v.part);
  give_back(ring, s);
  v.template add<P::HALVES - 1>(now);
  now = next;
}

// scales: of this thread's row of x in a stage; of_w: those of weights, of a tile. A loop is last, and how often it runs is
// hidden: what comes after a tile is not begun among its last products, for which there are no registers. Of any group the
// code is short: it comes from memory, and tiles of few pairs are what a small batch has.
template <int GROUP, typename P>
DEV void multiply_tile(P& v, const Ring& ring, u32 scales, u32 of_w, Uses& uses) {
  constexpr int TURNS = GROUP == ANY ? 1 : STAGES, ODD = BLOCKS % TURNS;
  u32 end = BLOCKS;
  Scales now;
  wait(ring.full, uses.parity(0));
  now.read(ring.data + scales, of_w, P::HALVES == 1 && v.first_half());
#pragma unroll
  for (int s = 0; s < ODD; s++) multiply_stage<GROUP>(v, ring, now, uses, s, scales, of_w, s, s + 1 < BLOCKS);
  forget(end);
#pragma unroll 1
  for (int b = ODD; b < end; b += TURNS) {
#pragma unroll
    for (int s = 0; s < TURNS; s++) {
      int stage = GROUP == ANY ? b % STAGES : (ODD + s) % STAGES;
      multiply_stage<GROUP>(v, ring, now, uses, stage, scales, of_w, b + s, s < TURNS - 1 || b + TURNS < end);
    }
  }
}

template <int HALVES>
DEV void run(const Params& p, const Ring& ring, u32 slot, Uses& uses) {
  Part<HALVES> v;
  int first = v.first_pair() + threadIdx.x / 32 % 4 * 16, place = first + threadIdx.x % 32 / 4;
  u32 scales = OF_SCALES + FOUR * 4 * place, of_w = slot + OF_W_SCALES;
  forget(scales);
  v.clear();
  if constexpr (HALVES == 1) multiply_tile<ANY>(v, ring, scales, of_w, uses);
  else if (threadIdx.x < 128) multiply_tile<0>(v, ring, scales, of_w, uses);
  else multiply_tile<1>(v, ring, scales, of_w, uses);
  Tile t = tile_in(slot);  // again: the loop has no register to keep it
  if (HAS_BIAS) add_biases(v, p, t);
  if constexpr (PRODUCT == 1) write_first(v, p, t, place, ring.data + TURN);
  else write_second(v, p, t, slot, first, ring.data + TURN + threadIdx.x / 32 * TURNED);
}

DEV void consume(const Params& p, const Ring& ring) {
  Uses uses = {0};
  int slot = 0;
  u32 phase = 0;
  while (true) {
    wait(ring.told + 8 * slot, phase);
    u32 at = ring.slots + slot * SLOT;
    int count = tile_in(at).count;
    if (count < 0) break;
    if (count > 64) run<2>(p, ring, at, uses);
    else run<1>(p, ring, at, uses);
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
}

#if CLUSTER == 1
#define BLOCKS_TOGETHER
#else
#define BLOCKS_TOGETHER __cluster_dims__(2, 1, 1)
#endif
extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) BLOCKS_TOGETHER
    fp8_once_cuda(const __grid_constant__ Params p, const __grid_constant__ Map x, const __grid_constant__ Map x_scale,
               const __grid_constant__ Map w) {
  u8* memory = shared_memory();
  Ring ring;
  ring.data = shared_address(memory);
  ring.slots = ring.data + RING;
  ring.full = ring.data + BARRIERS;
  ring.empty = ring.full + 8 * STAGES;
  ring.told = ring.empty + 8 * STAGES;
  if (ring.data % 1024) __trap();  // what swizzled rows and their operands need
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init(ring.full + 8 * i, 1);
      init(ring.empty + 8 * i, CLUSTER * GROUPS * 4);
    }
    for (int i = 0; i < SLOTS; i++) init(ring.told + 8 * i, COPIERS + 1);
    publish_barriers();
  }
  __syncthreads();
  if (CLUSTER > 1) meet_cluster();
  wait_for_previous();
  launch_next();
  if (threadIdx.x < GROUPS * 128) {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, ring);
  } else {
    leave_registers<PRODUCER_REGISTERS>();
    int thread = threadIdx.x - GROUPS * 128;
    if (thread < COPIERS) produce(p, Maps{&x, &x_scale, &w}, ring, memory + RING, thread);
  }
  if (CLUSTER > 1) sync_cluster();  // the other's copies and arrivals come to this block's memory
}

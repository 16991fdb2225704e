// 4-bit weights and e4m3 activations on Hopper's FP8 tensor cores: weights are decoded into the registers of wgmmas, a
// wgmma's A operand; pairs are its B operand.
//
// A producer (fp8_cuda_producer.cuh) fills a ring of stages, two blocks of 128 columns each; GROUPS of four warps decode 64
// rows at a time and multiply. A group's products run on while it decodes the next block, in the next stage too: what is
// waited for is always the block before. All groups run one copy of the code, and warps give a stage back each by itself.
//
// Columns: a thread q of four owns columns 32 q .. 32 q + 31 of a block, eight words of 16 bits and their scale or two as they
// lie in memory (fp8_layout.TritonFP4). A wgmma of 32 columns wants columns 4 q and 16 + 4 q and three on from it, so those of
// a block are taken in another order: place 32 s + 16 h + 4 q + j is column 32 q + 8 s + 4 h + j, and x is written so.
//
// Decoding: two registers hold the eight products of a scale with e2m1's magnitudes, rounded to e4m3. They follow from the
// scale's byte: a power of two is 8 in it; 1.5 times a number is 5 more where its mantissa (the low three bits) is 1 to 5,
// else 4. A `prmt` by three bits of each code selects, and its sign is put in: 7 instructions for 8 codes.
//
// Sums: Hopper's FP8 products keep about 14 bits of the sums they add to. So SPAN blocks are added there, then in float32:
// 512 columns take a quarter of the additions that 128 do, at an error of a layer of 0.6 % for 0.4 (docs/numerics.md).
//
// Constants: paths/fp8_cuda.py. A tile is GROUPS * PARTS strips of 64 rows, and up to PAIRS pairs; WIDTHS of it are products.

// --- operands ------------------------------------------------------------------------------------------------------
struct Tables { u32 low, high; };  // a scale times 0, .5, 1, 1.5, and times 2, 3, 4, 6, rounded to e4m3

// Of 32 columns of two rows, two scales each; or one, a power of two, MXFP4's, which takes two
// multiply-adds: 1, 1.5, 2, 3, 4 and 6 times one are 0, 4, 8, 12, 16 and 20 more in its byte, half of it is 8 less. A `prmt`
// by 8 + i gives the sign of byte i, which is 0; mantissas of 1 to 5 are m + 7 >= 8 and m + 2 < 8.
DEV void tables_of(Tables (&t)[2][2], u32 s0, u32 s1) {
  constexpr u32 LOW = 0x03fff800u, HIGH = 0x14100c08u;
  if constexpr (POWERS) {
    t[0][0] = t[0][1] = {s0 * 0x01010100u + LOW, s0 * 0x01010101u + HIGH};
    t[1][0] = t[1][1] = {s1 * 0x01010100u + LOW, s1 * 0x01010101u + HIGH};
  } else {
    u32 w = permute(s0, s1, 0x5410), m = w & 0x07070707u;
    u32 x = w + (logic<0x20>(m + 0x07070707u, m + 0x02020202u, 0x08080808u) >> 3);
    t[0][0] = {permute(w, x, 0x4008) + LOW, permute(w, x, 0x4040) + HIGH};
    t[0][1] = {permute(w, x, 0x5119) + LOW, permute(w, x, 0x5151) + HIGH};
    t[1][0] = {permute(w, x, 0x622A) + LOW, permute(w, x, 0x6262) + HIGH};
    t[1][1] = {permute(w, x, 0x733B) + LOW, permute(w, x, 0x7373) + HIGH};
  }
}

DEV void decode(u32 word, const Tables& t, u32& first, u32& second) {  // 8 codes -> two times four e4m3
  u32 m = word & 0x77777777u;
  first = logic<0xEA>(word, 0x80808080u, permute(t.low, t.high, m));
  second = logic<0xEA>(word << 4, 0x80808080u, permute(t.low, t.high, m >> 16));
}

// Of 64 rows and block u of a stage: four registers for each of its four wgmmas.
DEV void operands(u32 (&a)[16], const Spot& at, u32 stage, int part, int u) {
  u32 upper[4], lower[4], w = stage + at.w + (2 * part + u) * CODES, s = stage + at.s + (2 * part + u) * SCALES;
  load16(upper, w);
  load16(lower, w + 8 * 64);
  Tables t[2][2];
  if constexpr (POWERS) tables_of(t, load1(s), load1(s + SCALES / 8));
  else tables_of(t, load2(s), load2(s + SCALES / 8));
#pragma unroll
  for (int i = 0; i < 4; i++) {
    decode(upper[i], t[0][i / 2], a[4 * i], a[4 * i + 2]);
    decode(lower[i], t[1][i / 2], a[4 * i + 1], a[4 * i + 3]);
  }
}

template <int W>
DEV void multiply(float (&part)[W / 2], const u32 (&a)[16], u32 x, bool go_on) {
  u64 b = operand(x);
  begin_products();
  Mma<W>::run(part, a, b, go_on);
  Mma<W>::run(part, a + 4, b + 2, true);
  Mma<W>::run(part, a + 8, b + 4, true);
  Mma<W>::run(part, a + 12, b + 6, true);
  end_products();
}

// --- sums ------------------------------------------------------------------------------------------------------------
static_assert((BLOCKS + 1) / 2 * 2 % SPAN == 0 && SPAN % 2 == 0, "spans are whole");

template <int W>
struct Sums {
  float sum[PARTS][W / 2], part[PARTS][W / 2];  // in float32, and in the tensor core
  u32 a[2][16];
  int last;  // the stage whose products may still run

  __device__ __forceinline__ void add() {  // waits for all products
#pragma unroll
    for (int s = 0; s < PARTS; s++) {
      Mma<W>::wait(part[s]);
#pragma unroll
      for (int i = 0; i < W / 2; i++) sum[s][i] += part[s][i];
    }
  }
  __device__ __forceinline__ void give_back(const Ring& ring) {
    if (threadIdx.x % 32 == 0) arrive(ring.empty + 8 * last);
  }

  // SPAN blocks that the tensor core adds itself; the last one's products run on.
  __device__ __forceinline__ void span(const Ring& ring, const Spot& spot, Turn& at, bool first) {
#pragma unroll
    for (int b = 0; b < SPAN; b++) {
      u32 stage = ring.data + at.stage * STAGE;
      if (b % 2 == 0) {
        wait(ring.full + 8 * at.stage, at.phase);
        if (GATHER) fence_for_products();
      }
#pragma unroll
      for (int s = 0; s < PARTS; s++) {
        u32(&mine)[16] = a[(b * PARTS + s) % 2];
        operands(mine, spot, stage, s, b % 2);
        if (b == 0 && s == 0) {
          add();
          if (!first) give_back(ring);
        }
        multiply<W>(part[s], mine, stage + b % 2 * X_BLOCK, b > 0);
        if (s == 0 && b == 0) continue;
        wait_for_all_but_one();
        if (s == 0 && b % 2 == 0) give_back(ring);
      }
      if (b % 2 == 1) {
        last = at.stage;
        at.next();
      }
    }
  }
};

// --- the groups that multiply ------------------------------------------------------------------------------------------
template <int W>
DEV void run(const Params& p, const Ring& ring, const Spot& spot, const u8* slot, int g, Turn& at) {
  Sums<W> sums;
#pragma unroll
  for (int s = 0; s < PARTS; s++)
#pragma unroll
    for (int i = 0; i < W / 2; i++) sums.sum[s][i] = 0.f, sums.part[s][i] = 0.f;
  bool first = true;
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b += SPAN) {
    sums.span(ring, spot, at, first);
    first = false;
  }
  sums.add();
  sums.give_back(ring);
#pragma unroll
  for (int s = 0; s < PARTS; s++) write<W>(sums.sum[s], p, ring, slot, g * PARTS + s);
}

DEV void consume(const Params& p, Ring ring, const u8* slots) {
  int g = threadIdx.x / 128, row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Spot spot = {(u32)(X_STAGE + g * PARTS * 2 * CODES + row * 64 + q * 16),
               (u32)(X_STAGE + W_STAGE + g * PARTS * 2 * SCALES + row * (SCALES / 64) + q * (SCALES / 256))};
  Turn at = {0, 0};
  int slot = 0;
  u32 phase = 0;
  while (true) {
    wait(ring.told + 8 * slot, phase);
    const u8* mine = slots + slot * SLOT;
    int count = ((const Tile*)(mine + OF_TILE))->count;
    if (count < 0) break;
    forget(ring), forget(spot.w), forget(spot.s);
    with_width(Widths<WIDTHS>(), count, [&](auto w) { run<decltype(w)::value>(p, ring, spot, mine, g, at); });
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1)
    fp4_fp8_cuda(const __grid_constant__ Params p, const __grid_constant__ Map whole, const __grid_constant__ Map piece) {
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
      init(ring.full + 8 * i, GATHER ? COPIERS + 1 : 1);
      init(ring.empty + 8 * i, GROUPS * 4);
    }
    for (int i = 0; i < SLOTS; i++) init(ring.told + 8 * i, COPIERS + 1);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < GROUPS * 128) {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, ring, memory + RING);
  } else {
    leave_registers<PRODUCER_REGISTERS>();
    int thread = threadIdx.x - GROUPS * 128;
    if (thread < COPIERS) produce(p, Maps{&whole, &piece}, ring, memory + RING, thread);
  }
}

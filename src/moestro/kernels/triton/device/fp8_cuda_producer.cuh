// Of fp8_cuda.cu: its parameters, the ring in shared memory, and the producer that fills the ring.
//
// A stage has two blocks of 128 columns: x [2][PAIRS][128] swizzled, then codes and scales [strip][2] as they lie in memory,
// whose 16 bytes a thread eight lanes read without conflicts. A slot tells of one tile. Barriers: `full` and `empty` of a
// stage, `told` of a slot.
//
// The second product's table is older than the kernel before it (which lets it begin early) and so are its weights: those of
// its first stages are on their way while the first product ends and its results are quantised.

struct Params {
  const u8 *codes, *scales;  // TritonFP4's words and scales
  const float* row_scale;
  const BIAS* bias;
  const u8* x;  // e4m3, whole blocks, by token where GATHER, else by place
  const float* x_scale;
  const int *sorted_pairs, *table;
  void* out;
  i64 stride;  // of the table
};
struct Maps { const Map *whole, *piece; };  // of x by place: a tile's rows, and PIECE of them

constexpr int EACH = GROUPS * PARTS, PIECE = 16, CODES = 4096, SCALES = POWERS ? 256 : 512;  // bytes of a strip's block
constexpr int X_BLOCK = PAIRS * 128;
constexpr int X_STAGE = 2 * X_BLOCK, W_STAGE = 2 * EACH * CODES, STAGE = X_STAGE + W_STAGE + 2 * EACH * SCALES;
constexpr int STRIPS = (ROW_BLOCKS + EACH - 1) / EACH;  // tiles on top of each other
// Of tiles told of: one is not written again before all groups have left its tile, to give back a stage of the next.
constexpr int STAGES_OF_TILE = (BLOCKS + 1) / 2, SLOTS = (STAGES + STAGES_OF_TILE - 1) / STAGES_OF_TILE + 1;
constexpr int OF_X = 0, OF_PAIRS = PAIRS * 4, OF_ROWS = PAIRS * 8, OF_TILE = OF_ROWS + EACH * 256, SLOT = OF_TILE + 16;
constexpr int COPIERS = GATHER ? 128 : 32;  // threads of the producer
// Stages whose weights are asked for that early.
constexpr int AHEAD = PRODUCT == 1 ? 0 : STAGES < STAGES_OF_TILE ? STAGES : STAGES_OF_TILE;
constexpr int RING = STAGES * STAGE, BARRIERS = RING + (SLOTS * SLOT + 7) / 8 * 8, BYTES = BARRIERS + 8 * (2 * STAGES + SLOTS);
// What is left turns results of the second product, 8 pairs x 16 rows at a time.
constexpr int TURN = (BYTES + 15) / 16 * 16, TURNED = 256, LEFT = (SHARED_BYTES - TURN) / (TURNED * GROUPS * 4);
constexpr int TURNS = LEFT >= 4 ? 4 : LEFT >= 2 ? 2 : 1;
static_assert(LEFT > 0, "shared memory");

struct Ring { u32 data, slots, full, empty, told; };  // addresses: stages, tiles, and the barriers of both
struct Spot { u32 w, s; };                             // of a thread's codes and scales in a stage

DEV void forget(Ring& r) { forget(r.data), forget(r.slots), forget(r.full), forget(r.empty), forget(r.told); }

// --- widths --------------------------------------------------------------------------------------------------------
template <int N>
struct Width { static constexpr int value = N; };
template <int... W>
struct Widths {};

// run(Width<w>) with the smallest that holds count, or the largest; in ascending order.
template <typename F, int W, int... More>
DEV void with_width(Widths<W, More...>, int count, F&& run) {
  if constexpr (sizeof...(More) == 0) run(Width<W>());
  else if (count <= W) run(Width<W>());
  else with_width(Widths<More...>(), count, run);
}

// --- the producer --------------------------------------------------------------------------------------------------
template <int W>
DEV void tell(const Params& p, const Ring& ring, const Tile& t, int slot, u8* slots, int thread) {
  u32 to = ring.slots + slot * SLOT, bar = ring.told + 8 * slot;
#pragma unroll
  for (int i = thread; i < W; i += COPIERS) {
    int place = t.start + min(i, t.count - 1);
    copy4(to + OF_X + 4 * i, p.x_scale + (GATHER ? p.sorted_pairs[place] / TOP_K : place));
    if (PRODUCT == 2) copy4(to + OF_PAIRS + 4 * i, p.sorted_pairs + place);
  }
#pragma unroll
  for (int i = thread; i < EACH * 16; i += COPIERS) {
    int strip = min(t.strip * EACH + i / 16, ROW_BLOCKS - 1);
    copy16(to + OF_ROWS + 16 * i, p.row_scale + (i64)(t.expert * ROW_BLOCKS + strip) * 64 + i % 16 * 4);
  }
  arrive_when_copied(bar);
  if (thread == 0) {
    *(Tile*)(slots + slot * SLOT + OF_TILE) = t;
    arrive(bar);
  }
}

DEV bool has_two(int b) { return BLOCKS % 2 == 0 || b + 1 < BLOCKS; }

template <int N>
DEV void copy_blocks(u32 to, const u8* from, u32 bar, int b) {
  if (has_two(b)) {
    copy_bytes(to, from, 2 * N, bar);
  } else {
    copy_bytes(to, from, N, bar);
    copy_bytes(to + N, from, N, bar);
  }
}

// Weights; of x, which lies in order or is gathered, `width` rows are expected. A block behind the last of an odd number has
// the last one's weights again, and zeros for x, which lie beyond its columns.
DEV void copy_weights(const Params& p, const Tile& t, u32 stage, u32 bar, int b, int width) {
  expect(bar, 2 * ((GATHER ? 0 : width * 128) + EACH * (CODES + SCALES)));
#pragma unroll
  for (int g = 0; g < EACH; g++) {  // strips beyond an expert's are its last one's again
    i64 block = (i64)(t.expert * ROW_BLOCKS + min(t.strip * EACH + g, ROW_BLOCKS - 1)) * BLOCKS + b;
    copy_blocks<CODES>(stage + X_STAGE + g * 2 * CODES, p.codes + block * CODES, bar, b);
    copy_blocks<SCALES>(stage + X_STAGE + W_STAGE + g * 2 * SCALES, p.scales + block * SCALES, bar, b);
  }
}

// Rows of x that lie in order: those behind a tile's last are another's or zeros, and not written.
template <int W>
DEV void copy_x(const Maps& maps, const Tile& t, u32 stage, u32 bar, int b) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    u32 to = stage + u * X_BLOCK;
    if constexpr (W == PAIRS) {
      copy_box(to, maps.whole, (b + u) * 128, t.start, bar);
    } else {
#pragma unroll
      for (int i = 0; i < W; i += PIECE) copy_box(to + i * 128, maps.piece, (b + u) * 128, t.start + i, bar);
    }
  }
}

// ahead: stages whose weights are asked for.
template <int W>
DEV void fill(const Params& p, const Maps& maps, const Ring& ring, const Tile& t, int slot, u8* slots, Turn& at, int thread,
              int ahead) {
  u32 rows[W / 16];  // of x that this thread gathers 16 bytes of, in blocks; beyond the last, the last again
  if constexpr (GATHER) {
#pragma unroll
    for (int i = 0; i < W / 16; i++)
      rows[i] = (u32)(p.sorted_pairs[t.start + min(16 * i + thread / 8, t.count - 1)] / TOP_K) * BLOCKS;
  }
  const u8* from = p.x + thread % 8 * 16;
  u32 to = thread / 8 * 128 + ((thread % 8 ^ thread / 8 % 8) << 4);
  wait(ring.empty + 8 * at.stage, at.phase);
  tell<W>(p, ring, t, slot, slots, thread);
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b += 2) {
    u32 bar = ring.full + 8 * at.stage, stage = ring.data + at.stage * STAGE;
    wait(ring.empty + 8 * at.stage, at.phase);
    if constexpr (!GATHER) __syncwarp();  // before a copy lets the barrier turn again: none falls behind by two of its phases
    if (thread == 0) {
      if (b >= 2 * ahead) copy_weights(p, t, stage, bar, b, W);
      if constexpr (!GATHER) copy_x<W>(maps, t, stage, bar, b);
    }
    if constexpr (GATHER) {
#pragma unroll
      for (int i = 0; i < W / 16; i++) {
        const u8* row = from + (u64)rows[i] * 128;
        copy16(stage + to + i * 2048, row);
        copy16(stage + to + i * 2048 + X_BLOCK, row + 128, has_two(b) ? 16 : 0);
      }
      from += 256;
      arrive_when_copied(bar);
    }
    at.next();
  }
}

DEV void produce(const Params& p, const Maps& maps, Ring ring, u8* slots, int thread) {
  Turn at = {0, 1};
  if (AHEAD == 0) wait_for_previous(), launch_next();
  int slot = 0, tiles = p.table[3 * p.stride], total = total_of(tiles * STRIPS, gridDim.x), ahead = AHEAD;
  for (int number = blockIdx.x; number < total; number += gridDim.x) {
    Tile t = tile_of<STRIPS>(p.table, p.stride, tiles, number, gridDim.x);
    if (t.count <= 0) continue;
    forget(ring);
    with_width(Widths<WIDTHS>(), t.count, [&](auto w) {
      constexpr int W = decltype(w)::value;
      if (ahead > 0) {
        if (thread == 0)
          for (int i = 0; i < ahead; i++) copy_weights(p, t, ring.data + i * STAGE, ring.full + 8 * i, 2 * i, W);
        wait_for_previous(), launch_next();
      }
      fill<W>(p, maps, ring, t, slot, slots, at, thread, ahead);
    });
    ahead = 0;
    if (++slot == SLOTS) slot = 0;
  }
  if (ahead > 0) wait_for_previous();  // without a tile, too: what comes after this kernel comes after that one
  wait(ring.empty + 8 * at.stage, at.phase);
  if (thread == 0) {
    *(Tile*)(slots + slot * SLOT + OF_TILE) = Tile{0, 0, 0, -1};
    arrive(ring.told + 8 * slot);
  }
  arrive(ring.told + 8 * slot);
}

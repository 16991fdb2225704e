// What persistent programs share: the order of tiles (share.py's); and where a stage of a ring is that goes on from tile to tile,
// as fp8_cuda's does.
//
// Constants: STAGES of the ring, and RASTER tiles of pairs walk the strips of rows together.

struct Tile { int strip, expert, start, count; };  // count: pairs up to the end of the expert, -1: no more tiles

// Where a stage is, and the parity of its barriers.
struct Turn {
  int stage;
  u32 phase;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// --- tiles: share.py's order ---------------------------------------------------------------------------------------
template <int STRIPS>  // tiles on top of each other
DEV Tile tile_of(const int* table, i64 stride, int tiles, int number, int programs) {
  int turn = number / programs;
  int tile = turn % 2 ? (2 * turn + 1) * programs - 1 - number : number;
  constexpr int WALK = RASTER * STRIPS;
  int group = tile / WALK, within = tile - group * WALK;
  int wide = max(min(tiles - group * RASTER, RASTER), 1);
  int t = group * RASTER + within % wide;
  Tile r = {within / wide, 0, 0, 0};
  if (tile < tiles * STRIPS) {
    r.expert = table[t];
    r.start = table[stride + t];
    r.count = table[2 * stride + t] - r.start;
  }
  return r;
}

// Numbers of tiles, as many for each program.
DEV int total_of(int tiles, u32 programs) { return (tiles + programs - 1) / programs * programs; }

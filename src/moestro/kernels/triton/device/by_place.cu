// x by place: each token's row is quantised once, to shared memory, and copied to the places of all its pairs, whose order is
// sort.py's.
//
// The numbers are those of fp8.quantize_fp8: a scale, of a row or with BLOCK_SCALES of 128 columns, is the largest magnitude
// / 448, or 1 where all is zero; e4m3 to the nearest, ties to even; beyond the last column zeros. A thread quantises 16
// columns at a time, eight lanes a block. places.cu finds the places, as the sort gives the pairs of them.
// Constants: THREADS of a block, BLOCK_SCALES, COLUMNS of x, CHUNKS of 16 columns that a row has, whether they are TURNED within blocks of 128, TOP_K, OFFSET and
// EXPERTS of this rank, X (bf16_to_float, half_to_float), ALIGNED: whether rows lie at multiples of 8 bytes.

struct Params {
  const u16* x;
  const int *ids, *places;
  u8* data;       // [places, CHUNKS * 16]
  float* scales;  // [places], or [places, scale_blocks]
  i64 scale_blocks;
};

constexpr int EACH = (CHUNKS + THREADS - 1) / THREADS;

DEV void load_four(float* v, const u16* from) {
  if constexpr (ALIGNED) {
    uint2 four = *(const uint2*)from;
    v[0] = X((u16)four.x), v[1] = X((u16)(four.x >> 16)), v[2] = X((u16)four.y), v[3] = X((u16)(four.y >> 16));
  } else {
    for (int i = 0; i < 4; i++) v[i] = X(from[i]);
  }
}

// Where they are turned, place 32 s + 16 h + 4 q + j of a block is column 32 q + 8 s + 4 h + j: chunk 2 s + h has four columns
// of each q.
DEV void load_chunk(float (&v)[16], const u16* row, int chunk) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    int column = TURNED ? chunk / 8 * 128 + 32 * q + chunk % 8 * 4 : chunk * 16 + 4 * q;
    v[4 * q] = v[4 * q + 1] = v[4 * q + 2] = v[4 * q + 3] = 0.f;
    if (chunk < CHUNKS && column < COLUMNS) load_four(v + 4 * q, row + column);
  }
}

DEV float largest(const float (&v)[16]) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i++) most = fmaxf(most, fabsf(v[i]));
  return most;
}

template <int LANES>
DEV float largest_of(float v) {
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, bit));
  return v;
}

DEV float largest_of_row(float v) {
  __shared__ float of_warps[THREADS / 32];
  v = largest_of<32>(v);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) v = fmaxf(v, of_warps[i]);
  return v;
}

DEV float scale_of(float most) { return most == 0.f ? 1.f : fmaxf(__fdiv_rn(most, 448.f), 1.1754943508222875e-38f); }

struct Sixteen { u32 r[4]; };
DEV Sixteen quantized(const float (&v)[16], float scale) {
  Sixteen out;
#pragma unroll
  for (int q = 0; q < 4; q++)
    out.r[q] = two_e4m3(__fdiv_rn(v[4 * q], scale), __fdiv_rn(v[4 * q + 1], scale)) |
           (u32)two_e4m3(__fdiv_rn(v[4 * q + 2], scale), __fdiv_rn(v[4 * q + 3], scale)) << 16;
  return out;
}

extern "C" __global__ void __launch_bounds__(THREADS) spread(const __grid_constant__ Params p) {
  wait_for_previous();
  launch_next();
  int token = blockIdx.x, place[TOP_K], last = -1;  // of each of its pairs: -1 is another rank's
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    int pair = token * TOP_K + k;
    place[k] = (u32)(p.ids[pair] - OFFSET) < (u32)EXPERTS ? p.places[pair] : -1;
    last = max(last, place[k]);
  }
  if (last < 0) return;  // all of them are
  float v[EACH][16], most = 0.f, scale[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    load_chunk(v[i], p.x + (i64)token * COLUMNS, threadIdx.x + i * THREADS);
    float mine = largest(v[i]);
    most = fmaxf(most, mine);
    if (BLOCK_SCALES) scale[i] = scale_of(largest_of<8>(mine));
  }
  if constexpr (!BLOCK_SCALES) {
    scale[0] = scale_of(largest_of_row(most));
#pragma unroll
    for (int i = 1; i < EACH; i++) scale[i] = scale[0];
  }
  u32 row = shared_address(shared_memory());
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int chunk = threadIdx.x + i * THREADS;
    if (chunk < CHUNKS) store16(row + chunk * 16, quantized(v[i], scale[i]).r);
  }
  fence_for_products();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    if (place[k] < 0) continue;
    i64 to = place[k];
    if (threadIdx.x == 0) copy_out(p.data + to * CHUNKS * 16, row, CHUNKS * 16);
    if (!BLOCK_SCALES && threadIdx.x == 0) p.scales[to] = scale[0];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int chunk = threadIdx.x + i * THREADS;
      if (BLOCK_SCALES && chunk < CHUNKS && chunk % 8 == 0) p.scales[to * p.scale_blocks + chunk / 8] = scale[i];
    }
  }
  if (threadIdx.x == 0) wait_for_copies_out();
}

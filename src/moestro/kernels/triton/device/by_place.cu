// x by place: each token's row is quantised once and written to the places of all its pairs, whose order is sort.py's.
//
// The order of columns and the numbers are those of fp8.quantize_fp8: a row's scale is its largest magnitude / 448, or 1
// where all is zero; e4m3 to the nearest, ties to even. places.cu finds the places, as the sort gives the pairs of them.
// Constants: COLUMNS of x, BLOCKS of 128 columns, TOP_K, OFFSET and EXPERTS of this rank, X (bf16_to_float, half_to_float).

struct Params { const u16* x; const int *ids, *places; u8* data; float* scales; };

constexpr int CHUNKS = BLOCKS * 8, EACH = (CHUNKS + THREADS - 1) / THREADS;  // of 16 places

DEV float largest_of_block(float v) {
  __shared__ float of_warps[THREADS / 32];
  for (int bit = 16; bit; bit /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, bit));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) v = fmaxf(v, of_warps[i]);
  return v;
}

// Place 32 s + 16 h + 4 q + j of a block is column 32 q + 8 s + 4 h + j: chunk 2 s + h has four columns of each q.
DEV void load_chunk(float (&v)[16], const u16* row, int chunk) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    int column = chunk / 8 * 128 + 32 * q + chunk % 8 * 4;
    uint2 four = chunk < CHUNKS && column < COLUMNS ? *(const uint2*)(row + column) : make_uint2(0, 0);
    v[4 * q] = X((u16)four.x), v[4 * q + 1] = X((u16)(four.x >> 16));
    v[4 * q + 2] = X((u16)four.y), v[4 * q + 3] = X((u16)(four.y >> 16));
  }
}

DEV uint4 quantized(const float (&v)[16], float scale) {
  u32 r[4];
#pragma unroll
  for (int q = 0; q < 4; q++)
    r[q] = two_e4m3(__fdiv_rn(v[4 * q], scale), __fdiv_rn(v[4 * q + 1], scale)) |
           (u32)two_e4m3(__fdiv_rn(v[4 * q + 2], scale), __fdiv_rn(v[4 * q + 3], scale)) << 16;
  return make_uint4(r[0], r[1], r[2], r[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) spread(const __grid_constant__ Params p) {
  wait_for_previous();
  launch_next();
  int token = blockIdx.x;
  float v[EACH][16], most = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    load_chunk(v[i], p.x + (i64)token * COLUMNS, threadIdx.x + i * THREADS);
#pragma unroll
    for (int j = 0; j < 16; j++) most = fmaxf(most, fabsf(v[i][j]));
  }
  most = largest_of_block(most);
  float scale = most == 0.f ? 1.f : fmaxf(__fdiv_rn(most, 448.f), 1.1754943508222875e-38f);
  uint4 q[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) q[i] = quantized(v[i], scale);
  for (int k = 0; k < TOP_K; k++) {
    int pair = token * TOP_K + k;
    if ((u32)(p.ids[pair] - OFFSET) >= (u32)EXPERTS) continue;  // another rank's
    i64 place = p.places[pair];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int chunk = threadIdx.x + i * THREADS;
      if (chunk < CHUNKS) *(uint4*)(p.data + (place * BLOCKS * 8 + chunk) * 16) = q[i];
    }
    if (threadIdx.x == 0) p.scales[place] = scale;
  }
}

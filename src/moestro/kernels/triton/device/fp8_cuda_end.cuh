// Of fp8_cuda.cu: the end of a tile. Sums times the scales of x and of rows, biases, the activation, and out.

// The first product's result, float32 by place: eight lanes write 32 bytes. j: this thread's column of it.
template <int W>
DEV void write_first(const float (&v)[W / 2], const Params& p, const Tile& t, int j, bool upper, bool lower) {
  int q = threadIdx.x % 4;
  float* out = (float*)p.out + (i64)(t.start + 2 * q) * OUT_STRIDE + j;
#pragma unroll
  for (int i = 0; i < W / 8; i++, out += 8 * (i64)OUT_STRIDE) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (8 * i + 2 * q + k >= t.count) continue;
      float a = v[4 * i + k], b = v[4 * i + 2 + k];
      if (upper) out[k * OUT_STRIDE] = activate(a, GATED ? b : a);
      if (!GATED && lower) out[k * OUT_STRIDE + 8] = activate(b, b);
    }
  }
}

// The second's, bfloat16 by pair: two lanes write 32 bytes. first: this warp's first row; turn: its TURNS * TURNED bytes.
template <int W>
DEV void write_second(const float (&v)[W / 2], const Params& p, const int* pairs, int count, int first, u32 turn) {
  int lane = threadIdx.x % 32, row = first + lane % 2 * 8, place = lane % 16 / 2;
  // pairs 4 to 7 have their halves exchanged, so that no two of a matrix meet in a bank
  u32 put = turn + lane % 8 * 32 + ((lane / 8 ^ lane / 4) & 1) * 16;
  u32 get = turn + lane / 16 * TURNED + place * 32 + ((lane ^ place / 4) & 1) * 16;
#pragma unroll
  for (int i = 0; i < W / 8; i += TURNS) {
#pragma unroll
    for (int u = 0; u < TURNS && i + u < W / 8; u++) {
      const float* four = v + 4 * (i + u);
      store_turned(put + u * TURNED, two_bf16(four[0], four[1]), two_bf16(four[2], four[3]));
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < TURNS && i + u < W / 8; u += 2) {
      u32 r[4];
      if (TURNS > 1 || lane < 16) load16(r, get + u * TURNED);
      int n = 8 * (i + u + lane / 16) + place;
      if (n < count && row < ROWS && (TURNS > 1 || lane < 16))
        *(uint4*)((u16*)p.out + (i64)pairs[n] * OUT_STRIDE + row) = make_uint4(r[0], r[1], r[2], r[3]);
    }
    __syncwarp();
  }
}

template <int W>
DEV void write(float (&v)[W / 2], const Params& p, const Ring& ring, const u8* slot, int part) {
  const float *of_x = (const float*)(slot + OF_X), *of_rows = (const float*)(slot + OF_ROWS) + part * 64;
  Tile t = *(const Tile*)(slot + OF_TILE);
  int strip = t.strip * EACH + part;
  if (strip >= ROW_BLOCKS) return;
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4, row = warp * 16 + lane / 4;
  int j = GATED ? strip * 32 + warp * 8 + lane / 4 : strip * 64 + row;
  bool upper = j < (GATED ? ROWS / 2 : ROWS), lower = GATED ? upper : j + 8 < ROWS;
  float s0 = of_rows[row], s1 = of_rows[row + 8], c0 = 0.f, c1 = 0.f;
  if constexpr (HAS_BIAS) {
    const BIAS* bias = p.bias + (i64)t.expert * ROWS + j;
    if (upper) c0 = OF_BIAS(bias[0]);
    if (lower) c1 = OF_BIAS(bias[GATED ? ROWS / 2 : 8]);
  }
#pragma unroll
  for (int i = 0; i < W / 8; i++) {
    float2 x = *(const float2*)(of_x + 8 * i + 2 * q);
    v[4 * i] = fmaf(v[4 * i] * x.x, s0, c0), v[4 * i + 1] = fmaf(v[4 * i + 1] * x.y, s0, c0);
    v[4 * i + 2] = fmaf(v[4 * i + 2] * x.x, s1, c1), v[4 * i + 3] = fmaf(v[4 * i + 3] * x.y, s1, c1);
  }
  if constexpr (PRODUCT == 1) write_first<W>(v, p, t, j, upper, lower);
  else write_second<W>(v, p, (const int*)(slot + OF_PAIRS), t.count, strip * 64 + warp * 16, ring.data + TURN + threadIdx.x / 32 * TURNS * TURNED);
}


// Of fp8_cuda.cu: the end of a tile. Sums times the scales of x and of rows, biases, the activation, and out.

DEV float activate(float gate, float up) {  // common.activate
  if constexpr (ACT == SWIGLU) {
    if (HAS_LIMIT) gate = fminf(gate, LIMIT), up = fminf(fmaxf(up, -LIMIT), LIMIT);
    return gate / (1.f + __expf(-ALPHA * gate)) * (up + SHIFT);
  } else if constexpr (ACT == GEGLU_TANH) {
    float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.f + __expf(-2.f * inner)) * up;
  } else if constexpr (ACT == RELU2) {
    float positive = fmaxf(gate, 0.f);
    return positive * positive;
  } else if constexpr (ACT == CLAMPED_SILU) {
    return fminf(gate / (1.f + __expf(-gate)), LIMIT) * fminf(fmaxf(up, -LIMIT), LIMIT);
  } else {
    float g = ALPHA - 2.f * ALPHA / (1.f + __expf(2.f / ALPHA * gate));
    return g / (1.f + __expf(-gate)) * (LIMIT - 2.f * LIMIT / (1.f + __expf(2.f / LIMIT * up)));
  }
}

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

// r and other, one of them exchanged with the lane whose number differs in this bit.
DEV void swap(u32& r, u32& other, int bit) {
  bool odd = threadIdx.x & bit;
  u32 got = __shfl_xor_sync(0xffffffffu, odd ? r : other, bit);
  if (odd) r = got;
  else other = got;
}

// The second's, bfloat16 by pair: two lanes write 32 bytes. first: this warp's first row.
template <int W>
DEV void write_second(const float (&v)[W / 2], const Params& p, const int* pairs, int count, int first) {
  int q = threadIdx.x % 4, row = first + (q & 1) * 8;
#pragma unroll
  for (int i = 0; i < W / 16; i++) {
    u32 r[4];  // of rows 0..7 and 8..15 by pairs 0..7, then by pairs 8..15
#pragma unroll
    for (int k = 0; k < 4; k++) r[k] = transposed(two_bf16(v[8 * i + 2 * k], v[8 * i + 2 * k + 1]));
    swap(r[0], r[1], 1);
    swap(r[2], r[3], 1);
    swap(r[0], r[2], 2);
    swap(r[1], r[3], 2);
    int n = 16 * i + threadIdx.x % 32 / 4 + (q & 2) * 4;
    if (n < count && row < ROWS)
      *(uint4*)((u16*)p.out + (i64)pairs[n] * OUT_STRIDE + row) = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

template <int W>
DEV void write(float (&v)[W / 2], const Params& p, const u8* slot, int part) {
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
  else write_second<W>(v, p, (const int*)(slot + OF_PAIRS), t.count, strip * 64 + warp * 16);
}


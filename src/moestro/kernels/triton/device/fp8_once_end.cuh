// What fp8_once does with the sums of a tile: biases, and the activation, quantised, or rows by pair.
//
// Sums of group i of eight rows of half h are at sum[h][4 i]: rows 8 i + 2 q and one on, of pairs 0..7 of a warp's 16, then of
// pairs 8..15; q is the lane's of four.
// The first of eight kernel rows: group i of the tile's half h.
DEV int first_row(const Tile& t, int h, int i) { return t.strip * TILE_ROWS + h * HALF + i * 8; }

template <typename P>
DEV void add_biases(P& v, const Params& p, const Tile& t) {
#pragma unroll
  for (int h = 0; h < P::HALVES; h++)
#pragma unroll
    for (int i = 0; i < HALF / 8; i++) {
      int r = first_row(t, P::first_half() + h, i), j = (GATED ? r / 16 * 8 : r) + threadIdx.x % 4 * 2;
      if (j >= OUT_ROWS) continue;
      const BIAS* bias = p.bias + (i64)t.expert * ROWS + j + (GATED && i % 2 ? OUT_ROWS : 0);
      float c0 = OF_BIAS(bias[0]), c1 = OF_BIAS(bias[1]);
      v.sum[h][4 * i] += c0, v.sum[h][4 * i + 1] += c1, v.sum[h][4 * i + 2] += c0, v.sum[h][4 * i + 3] += c1;
    }
}

// The largest magnitudes of two rows, and of the other group's columns of the same rows. turn: TURN's bytes.
DEV void join_largest(float (&most)[2], int group, int place, u32 turn) {
  meet_threads<GROUPS * 128>();  // all have read those of the tile before
#pragma unroll
  for (int row = 0; row < 2; row++)
    if (threadIdx.x % 4 == 0) store_float(turn + (group * 64 + place + 8 * row) * 4, most[row]);
  meet_threads<GROUPS * 128>();
#pragma unroll
  for (int row = 0; row < 2; row++) most[row] = fmaxf(most[row], load_float(turn + ((1 - group) * 64 + place + 8 * row) * 4));
}

// Two rows' columns from `first` on, v[i] of columns 8 i + 2 q and one on, of rows 0..7 and 8..15, over a scale of each row's
// block of 128, which is written; four lanes write 64 bytes of a row at a time. OTHERS: the other group has the block's others.
template <bool OTHERS, int EIGHTS>
DEV void write_block(float (&v)[EIGHTS][4], const Params& p, const Tile& t, int group, int place, int first, u32 turn) {
  int q = threadIdx.x % 4;
  float most[2] = {};
#pragma unroll
  for (int row = 0; row < 2; row++) {
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
      if (first + 8 * i >= OUT_ROWS) v[i][2 * row] = v[i][2 * row + 1] = 0.f;
      most[row] = fmaxf(most[row], fmaxf(fabsf(v[i][2 * row]), fabsf(v[i][2 * row + 1])));
    }
    most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 1));
    most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 2));
  }
  if constexpr (OTHERS) join_largest(most, group, place, turn);
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float scale = most[row] == 0.f ? 1.f : fmaxf(__fdiv_rn(most[row], 448.f), 1.1754943508222875e-38f), by = __fdiv_rn(1.f, scale);
    i64 to = t.start + place + 8 * row;
    bool there = place + 8 * row < t.count;
    if (there && q == 0 && (!OTHERS || group == 0)) p.out_scale[to * p.out_blocks + first / 128] = scale;
#pragma unroll
    for (int c = 0; c < EIGHTS / 8; c++) {  // 64 columns: 16 for each lane
      u32 r[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float *low = v[8 * c + 2 * k] + 2 * row, *high = v[8 * c + 2 * k + 1] + 2 * row;
        r[k] = two_e4m3(low[0] * by, low[1] * by) | (u32)two_e4m3(high[0] * by, high[1] * by) << 16;
      }
      exchange(r);
      uint4 out = make_uint4(permute(r[0], r[1], 0x5410), permute(r[2], r[3], 0x5410), permute(r[0], r[1], 0x7632),
                             permute(r[2], r[3], 0x7632));
      if (there) *(uint4*)((u8*)p.out + to * OUT_STRIDE + first + c * 64 + q * 16) = out;
    }
  }
}

// Gate and up alternate, so that a half has 64 columns; else it has 128.
template <typename P>
DEV void write_first(P& v, const Params& p, const Tile& t, int place, u32 turn) {
  if constexpr (GATED) {
    float out[8 * P::HALVES][4];
#pragma unroll
    for (int i = 0; i < 8 * P::HALVES; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) out[i][k] = activate(v.sum[i / 8][i % 8 * 8 + k], v.sum[i / 8][i % 8 * 8 + 4 + k]);
    int first = first_row(t, P::first_half(), 0) / 2;
    if (first_row(t, 0, 0) < KERNEL_ROWS) write_block<P::HALVES == 1>(out, p, t, group_of_thread(), place, first, turn);
  } else {
#pragma unroll
    for (int h = 0; h < P::HALVES; h++) {
      float out[16][4];
#pragma unroll
      for (int i = 0; i < 16; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) out[i][k] = activate(v.sum[h][4 * i + k], v.sum[h][4 * i + k]);
      int first = first_row(t, P::first_half() + h, 0);
      if (first < OUT_ROWS) write_block<false>(out, p, t, group_of_thread(), place, first, turn);
    }
  }
}

// 64 rows of 16 pairs to shared memory, bfloat16, eighths of a pair's 128 bytes exchanged so that no two rows of a matrix meet
// in a bank; and from there, a pair's eighth for each lane, of four pairs at a time.
DEV void turn_rows(const float* sums, u32 turn) {
  int lane = threadIdx.x % 32, to = lane % 16;
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    const float* eight = sums + 4 * k;
    u32 r[4] = {two_bf16(eight[0], eight[1]), two_bf16(eight[2], eight[3]), two_bf16(eight[4], eight[5]), two_bf16(eight[6], eight[7])};
    store_matrices(turn + to * 128 + (((lane / 16 + k) ^ to) & 7) * 16, r);
  }
}
DEV void load_turned(u32 (&r)[4][4], u32 turn) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int from = 4 * i + lane / 8;
    load16(r[i], turn + from * 128 + ((lane ^ from) & 7) * 16);
  }
}

// bfloat16, by pair: eight lanes write 128 bytes of a row. turn: this warp's TURNED bytes; what was read from there is written
// to memory after the next rows were turned. first_pair: of the warp's 16.
template <typename P>
DEV void write_second(const P& v, const Params& p, const Tile& t, u32 slot, int first_pair, u32 turn) {
  constexpr int TURNS = P::HALVES * 2;
  int lane = threadIdx.x % 32;
  u16* out[4];
  bool there[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int pair = first_pair + 4 * i + lane / 8;
    there[i] = pair < t.count;
    out[i] = (u16*)p.out + (i64)load4(slot + OF_PAIRS + 4 * min(pair, t.count - 1)) * OUT_STRIDE;
  }
  u32 r[4][4];
  turn_rows(v.sum[0], turn);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < TURNS; n++) {
    load_turned(r, turn);
    __syncwarp();
    if (n + 1 < TURNS) turn_rows(v.sum[(n + 1) / 2] + (n + 1) % 2 * 32, turn);
    int row = first_row(t, P::first_half() + n / 2, n % 2 * 8 + lane % 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (there[i] && row < ROWS) *(uint4*)(out[i] + row) = make_uint4(r[i][0], r[i][1], r[i][2], r[i][3]);
    __syncwarp();
  }
}

// What ends of tiles share: the activation; and, for fp8_once's first product, results that lanes exchange until each has what
// lies together.
//
// Constants: ACT and those of its formula (paths/fp8_cuda.py).

// 1 / (1 + exp(-x)). A division to the last place takes some 20 instructions, this 5.
DEV float sigmoid(float x) { return reciprocal(1.f + power_of_two(-1.4426950408889634f * x)); }

DEV float activate(float gate, float up) {  // common.activate
  if constexpr (ACT == SWIGLU) {
    if (HAS_LIMIT) gate = fminf(gate, LIMIT), up = fminf(fmaxf(up, -LIMIT), LIMIT);
    return gate * sigmoid(ALPHA * gate) * (up + SHIFT);
  } else if constexpr (ACT == GEGLU_TANH) {
    float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return gate * sigmoid(2.f * inner) * up;
  } else if constexpr (ACT == RELU2) {
    float positive = fmaxf(gate, 0.f);
    return positive * positive;
  } else if constexpr (ACT == CLAMPED_SILU) {
    return fminf(gate * sigmoid(gate), LIMIT) * fminf(fmaxf(up, -LIMIT), LIMIT);
  } else {
    float g = ALPHA - 2.f * ALPHA * sigmoid(-2.f / ALPHA * gate);
    return g * sigmoid(gate) * (LIMIT - 2.f * LIMIT * sigmoid(-2.f / LIMIT * up));
  }
}

// r and other, one of them exchanged with the lane whose number differs in this bit.
DEV void swap(u32& r, u32& other, int bit) {
  bool odd = threadIdx.x & bit;
  u32 got = __shfl_xor_sync(0xffffffffu, odd ? r : other, bit);
  if (odd) r = got;
  else other = got;
}

// r[i] of four lanes: lane q ends with what was r[q] of each.
DEV void exchange(u32 (&r)[4]) {
  swap(r[0], r[1], 1);
  swap(r[2], r[3], 1);
  swap(r[0], r[2], 2);
  swap(r[1], r[3], 2);
}

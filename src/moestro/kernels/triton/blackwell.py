"""W4A4 on FP4 tensor cores (sm_100): compiled in CI, never run by us, and not yet a tactic of TritonRunner.

One expert's product in the checkpoint layout, both operands packed e2m1 with an e4m3 scale per 16 columns;
the hardware multiplies the scales in. Global scales are left to the epilogue: one per row of x, one per row
of w.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_gemm(x, x_scales, w, w_scales, x_global, w_global, offsets, out, rows, columns, L,
                BT: tl.constexpr,
                BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out[p] = w[e] @ x[p] for the places p of expert e, offsets[e] .. offsets[e + 1].

    x uint8 [P, columns / 2], x_scales e4m3 [P, columns / 16], w uint8 [L, rows, columns / 2], w_scales e4m3
    [L, rows, columns / 16], x_global float32 [P], w_global float32 [L, rows], out bfloat16 [P, rows]. Grid:
    (strips of BR rows, L, tiles of BT places); BK divides columns.
    """
    e = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + e) + tl.program_id(2) * BT
    end = tl.load(offsets + e + 1)
    if start >= end:
        return
    p = start + tl.arange(0, BT)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    there, real = p < end, r < rows
    byte, group = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    xp = x + p[:, None] * (columns // 2) + byte[None, :]
    wp = w + (e * rows + r)[:, None] * (columns // 2) + byte[None, :]
    xs = x_scales + p[:, None] * (columns // 16) + group[None, :]
    ws = w_scales + (e * rows + r)[:, None] * (columns // 16) + group[None, :]
    acc = tl.zeros((BT, BR), tl.float32)
    for _ in tl.range(0, columns, BK, num_stages=STAGES):
        a = tl.load(xp, there[:, None], other=0)
        b = tl.load(wp, real[:, None], other=0)
        a_scale = tl.load(xs, there[:, None], other=0.0)
        b_scale = tl.load(ws, real[:, None], other=0.0)
        acc = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
        xp += BK // 2
        wp += BK // 2
        xs += BK // 16
        ws += BK // 16
    acc *= tl.load(x_global + p, there, other=0.0)[:, None]
    acc *= tl.load(w_global + e * rows + r, real, other=0.0)[None, :]
    tl.store(out + p[:, None] * rows + r[None, :], acc.to(tl.bfloat16), there[:, None] & real[None, :])

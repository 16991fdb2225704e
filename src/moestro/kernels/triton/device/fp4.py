"""One grouped product on FP4 tensor cores (sm_100): out[pair] = f(W[expert of pair] @ rows[pair]), W4A4.

Compiled in CI for sm_100 and held to the reference in Triton's interpreter, but never run on such a chip by us.

Both operands stay packed e2m1 with an e4m3 scale per 16 columns, and the tensor core multiplies the scales in;
global scales (one per expert or per group of its rows, one per row of x) are left to the epilogue, which is
that of `gemm.py`, like the tables of pairs and the order of rows with a gate. Weights stay as the checkpoint
has them. Rows of weights are the tensor core's 128-row operand, pairs its other one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import NVFP4, PTX, launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import _dense_rows, _finish, _x_rows


@triton.jit
def _values(packed, scale):
    """float32 [R, C] of codes uint8 [R, C / 2] and e4m3 scales [R, C / 16]: what the tensor core reads."""
    code = tl.join(packed & 15, packed >> 4).to(tl.int32)  # [R, C / 2, 2]
    magnitude = code & 7
    exponent = tl.maximum(magnitude >> 1, 1)
    half = tl.where(magnitude < 2, magnitude, 2 + (magnitude & 1)) << (exponent - 1)  # in steps of 0.5
    value = tl.where(code >= 8, -0.5, 0.5) * half.to(tl.float32)
    blocks = value.reshape(packed.shape[0], scale.shape[1], 16) * scale.to(tl.float32)[:, :, None]
    return blocks.reshape(packed.shape[0], packed.shape[1] * 2)


@triton.jit
def _dot_scaled(a, a_scale, b, b_scale, acc):
    """acc + a @ b.T; by hand in Triton 3.9's interpreter, which takes every scale for an e8m0."""
    if PTX:
        return tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
    else:
        return tl.dot(_values(a, a_scale), _values(b, b_scale).T, acc)


@triton.jit
def _scaled_product(x, x_blocks, x_rows, there, w, w_blocks, w_rows, real, columns, EVEN: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """float32 [BM, BN]: rows w_rows of w times rows x_rows of x, block scales included."""
    byte, group = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    wp = w + w_rows[:, None] * (columns // 2) + byte[None, :]
    ws = w_blocks + w_rows[:, None] * (columns // 16) + group[None, :]
    xp = x + x_rows[:, None] * (columns // 2) + byte[None, :]
    xs = x_blocks + x_rows[:, None] * (columns // 16) + group[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, columns, BK, num_stages=STAGES):
        bytes_in = byte[None, :] < (columns - k) // 2
        groups_in = group[None, :] < (columns - k) // 16
        w_mask, ws_mask = real[:, None] & bytes_in, real[:, None] & groups_in
        x_mask, xs_mask = there[:, None] & bytes_in, there[:, None] & groups_in
        if EVEN:
            w_mask, ws_mask, x_mask, xs_mask = real[:, None], real[:, None], there[:, None], there[:, None]
        a = tl.load(wp, w_mask, other=0)
        b = tl.load(xp, x_mask, other=0)
        a_scale = tl.load(ws, ws_mask, other=0.0)
        b_scale = tl.load(xs, xs_mask, other=0.0)
        acc = _dot_scaled(a, a_scale, b, b_scale, acc)
        wp += BK // 2
        ws += BK // 16
        xp += BK // 2
        xs += BK // 16
    return acc


@triton.jit(do_not_specialize=["stride", "slots", "num_zeros", "K", "groups"])
def scaled_gemm(
    x, x_blocks, x_scale, pair_weights, sorted_pairs, table, stride, w, w_blocks, w_global, groups, bias, out,
    zeros, slots, rows, columns, out_stride, num_zeros, K,
    STAGE: tl.constexpr, COMBINE: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, X_SCALE: tl.constexpr,
    X_BY_PAIR: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module, and gemm.moe_gemm for what has the same name there.

    x uint8 [., columns / 2], x_blocks e4m3 [., columns / 16], x_scale float32 [.]: by token (STAGE 1), by pair
    (STAGE 1 with X_BY_PAIR) or by place (STAGE 2). w uint8 [L, rows, columns / 2], w_blocks e4m3 [L, rows,
    columns / 16], w_global float32 [L, groups]. table: of tiles of BN sorted pairs.
    """
    pid = tl.program_id(0)
    strips = tl.num_programs(0) // slots
    slot = pid // (GROUP * strips) * GROUP + pid % GROUP
    m = pid % (GROUP * strips) // GROUP
    wait_for_previous(PDL)
    for first in range(pid * 1024, num_zeros, tl.num_programs(0) * 1024):
        i = first + tl.arange(0, 1024)
        tl.store(zeros + i, tl.zeros((1024,), tl.float32), i < num_zeros)
    launch_next(PDL)
    if slot < tl.load(table + 3 * stride):
        e = tl.load(table + slot).to(tl.int64)
        place = tl.load(table + stride + slot)
        count = tl.load(table + 2 * stride + slot) - place
        t = tl.arange(0, BN)
        pairs = tl.load(sorted_pairs + place + t, t < count, other=-1)
        r = m * BM + tl.arange(0, BM)
        dense_r, real = _dense_rows(r, rows, GATED)
        w_rows = e * rows + tl.where(real, dense_r, 0)
        scale = tl.load(w_global + e * groups + dense_r // (rows // groups), real, other=0.0)
        shift = tl.zeros((BM,), tl.float32)
        if BIAS:
            shift = tl.load(bias + e * rows + dense_r, real, other=0.0).to(tl.float32)
        x_rows = _x_rows(pairs, place + t, K, STAGE, X_BY_PAIR)
        acc = _scaled_product(x, x_blocks, x_rows.to(tl.int64), pairs >= 0, w, w_blocks, w_rows, real,
                              columns, EVEN, BM, BN, BK, STAGES)  # fmt: skip
        _finish(acc, scale, shift, x_scale, x_rows, pairs, place + t, pair_weights, out, m, r, 0, real, rows,
                out_stride, K, STAGE, COMBINE, NVFP4, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE, 1,
                BM, BN)  # fmt: skip

"""Many tokens: dequantise the weights once, then a bf16 grouped matrix product over tiles of tokens.

`expand` writes e2m1 · scale · 2^-8 (exact in bfloat16) in the kernels' row order; the rest of the value, one
number per row, goes into the epilogue. `dense_gemm` has tokens as A and weights as B, both in shared memory
through the tensor memory accelerator, but x in the first product, whose rows are gathered. Tiles are walked
in groups of GROUP token tiles, row tile after row tile, so that both operands come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import activate, decode_block, dot, launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import ATOMIC


@triton.jit
def expand(
    words, scales, dense, num_blocks, columns, EVEN: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr
):
    """dense bfloat16 [strips * 64, columns]; a program does COLS blocks of one strip of 64 rows."""
    wait_for_previous(PDL)
    launch_next(PDL)
    strip = tl.program_id(0).to(tl.int64)
    r, word, k = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, 64)
    for i in tl.static_range(COLS):
        b = tl.program_id(1) * COLS + i
        if b < num_blocks:
            at = strip * num_blocks + b
            w = tl.load(words + at * 1024 + r[:, None] * 16 + word[None, :])
            a = decode_block(w, tl.load(scales + at * 64 + r))
            to = dense + (strip * 64 + r)[:, None] * columns + b * 64 + k[None, :]
            if EVEN:
                tl.store(to, a)
            else:
                tl.store(to, a, (b * 64 + k < columns)[None, :])


@triton.jit(do_not_specialize=["stride", "num_zeros"])
def dense_gemm(
    x, x_desc, w_desc, x_scale, pair_weights, sorted_pairs, table, stride,
    row_scale, bias, out, zeros,
    rows, padded, columns, out_stride, num_zeros,
    STAGE: tl.constexpr, COMBINE: tl.constexpr, ROW_SCALE: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, GATHER: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of BT pairs and BR rows of weights [L * padded, columns] (`rows` of each expert's `padded` are
    real).

    GATED (in STAGE 1 only): INTERLEAVED weights are in kernel row order, else gate and up are two halves. x
    by token, or pair (X_BY_PAIR), if GATHER; by place otherwise. The rest is as in gemm.moe_gemm.
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    pid = tl.program_id(0)
    if STAGE == 1 and COMBINE == ATOMIC:
        for first in range(pid * 1024, num_zeros, tl.num_programs(0) * 1024):
            i = first + tl.arange(0, 1024)
            tl.store(zeros + i, tl.zeros((1024,), tl.float32), i < num_zeros)
    row_tiles = tl.cdiv(rows, BR)
    token_tiles = tl.load(table + 3 * stride)
    total = tl.cdiv(token_tiles, GROUP) * GROUP * row_tiles
    step = tl.num_programs(0) if PERSISTENT else total + 1
    for tile in tl.range(pid, total, step):
        group = tile // (GROUP * row_tiles)
        t = group * GROUP + tile % GROUP
        j = (tile % (GROUP * row_tiles)) // GROUP
        if t < token_tiles:
            _tile(x, x_desc, w_desc, x_scale, pair_weights, sorted_pairs, table, stride,
                  row_scale, bias, out, rows, padded, columns, out_stride, t, j, STAGE, COMBINE, ROW_SCALE,
                  INTERLEAVED, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE, X_BY_PAIR, GATHER, K, BT, BR,
                  BK, STAGES)  # fmt: skip


@triton.jit
def _tile(
    x, x_desc, w_desc, x_scale, pair_weights, sorted_pairs, table, stride,
    row_scale, bias, out, rows, padded, columns, out_stride, t, j,
    STAGE: tl.constexpr, COMBINE: tl.constexpr, ROW_SCALE: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, GATHER: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e = tl.load(table + t)
    start = tl.load(table + stride + t)
    places = start + tl.arange(0, BT)
    there = places < tl.load(table + 2 * stride + t)
    pairs = tl.load(sorted_pairs + places, there, other=0)
    if not GATHER:
        x_rows = places
    elif X_BY_PAIR:
        x_rows = pairs
    else:
        x_rows = pairs // K
    HALF: tl.constexpr = BR // 2
    k = tl.arange(0, BK)
    xp = x + x_rows.to(tl.int64)[:, None] * columns + k[None, :]
    SPLIT: tl.constexpr = GATED and not INTERLEAVED
    w_row = e * padded + j * (HALF if SPLIT else BR)
    acc = tl.zeros((BT, HALF if SPLIT else BR), tl.float32)
    acc_up = tl.zeros((BT, HALF if SPLIT else 16), tl.float32)
    for c in tl.range(0, columns, BK, num_stages=STAGES):
        if GATHER:
            a = tl.load(xp, (k < columns - c)[None, :], other=0.0)
            xp += BK
        else:
            a = x_desc.load([start, c])
        acc = dot(a, w_desc.load([w_row, c]).T, acc)
        if SPLIT:
            acc_up = dot(a, w_desc.load([w_row + rows // 2, c]).T, acc_up)
    if X_SCALE:
        scale = tl.load(x_scale + x_rows, there, other=0.0)[:, None]
        acc *= scale
        acc_up *= scale
    if SPLIT:
        i = j * HALF + tl.arange(0, HALF)
        if BIAS:
            acc += tl.load(bias + e * rows + i, i < rows // 2, other=0.0).to(tl.float32)[None, :]
            acc_up += tl.load(bias + e * rows + rows // 2 + i, i < rows // 2, other=0.0).to(tl.float32)[
                None, :
            ]
        v = activate(acc, acc_up, ACT, ALPHA, LIMIT, SHIFT)
        real = i < rows // 2
    else:
        r = j * BR + tl.arange(0, BR)
        if ROW_SCALE:
            acc *= tl.load(row_scale + e * padded + r, r < padded, other=0.0)[None, :]
        if GATED:
            i = j * HALF + tl.arange(0, HALF)
            real = i < rows // 2
            gate, up = acc.reshape(BT, BR // 16, 2, 8).permute(0, 1, 3, 2).split()
            gate = gate.reshape(BT, HALF)
            up = up.reshape(BT, HALF)
            if BIAS:
                gate += tl.load(bias + e * rows + i, real, other=0.0).to(tl.float32)[None, :]
                up += tl.load(bias + e * rows + rows // 2 + i, real, other=0.0).to(tl.float32)[None, :]
            v = activate(gate, up, ACT, ALPHA, LIMIT, SHIFT)
        else:
            i = r
            real = r < rows
            if BIAS:
                acc += tl.load(bias + e * rows + r, real, other=0.0).to(tl.float32)[None, :]
            v = activate(acc, acc, ACT, ALPHA, LIMIT, SHIFT) if STAGE == 1 else acc
    mask = there[:, None] & real[None, :]
    if STAGE == 1:
        to = places
    else:
        to = pairs // K if COMBINE == ATOMIC else pairs
        v *= tl.load(pair_weights + pairs, there, other=0.0)[:, None]
    at = out + to.to(tl.int64)[:, None] * out_stride + i[None, :]
    if STAGE == 2 and COMBINE == ATOMIC:
        tl.atomic_add(at, v, mask=mask, sem="relaxed")
    else:
        tl.store(at, v.to(out.dtype.element_ty), mask=mask)

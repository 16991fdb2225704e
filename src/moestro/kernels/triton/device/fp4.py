"""One grouped product on FP4 tensor cores (sm_100): out[pair] = f(W[expert of pair] @ rows[pair]), W4A4.

Compiled in CI for sm_100 and held to the reference in Triton's interpreter, but never run on such a chip by us.

Both operands stay packed e2m1 with an e4m3 scale per 16 columns, and the tensor core multiplies the scales in;
global scales (one per expert or per group of its rows, one per row of x) are left to the epilogue, which is
that of `fused.py`, like the tables of pairs and the order of rows with a gate. Weights stay as the checkpoint
has them. Rows of weights are the tensor core's 128-row operand, pairs its other one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.arguments import Spot
from moestro.kernels.triton.device.common import PTX, dense_rows, launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import epilogue, rows_of


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
def _scaled_product(x, x_blocks, x_rows, there, w, w_blocks, w_rows, real, columns, TILE: tl.constexpr):
    """float32 [rows, pairs]: rows w_rows of w times rows x_rows of x, block scales included."""
    ROWS: tl.constexpr = TILE.rows
    PAIRS: tl.constexpr = TILE.pairs
    BK: tl.constexpr = TILE.columns
    byte, group = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    wp = w + w_rows[:, None] * (columns // 2) + byte[None, :]
    ws = w_blocks + w_rows[:, None] * (columns // 16) + group[None, :]
    xp = x + x_rows[:, None] * (columns // 2) + byte[None, :]
    xs = x_blocks + x_rows[:, None] * (columns // 16) + group[None, :]
    acc = tl.zeros((ROWS, PAIRS), tl.float32)
    for k in tl.range(0, columns, BK, num_stages=TILE.stages):
        bytes_in = byte[None, :] < (columns - k) // 2
        groups_in = group[None, :] < (columns - k) // 16
        w_mask, ws_mask = real[:, None] & bytes_in, real[:, None] & groups_in
        x_mask, xs_mask = there[:, None] & bytes_in, there[:, None] & groups_in
        if TILE.even:
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


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int
    columns: int  # a step
    stages: int
    group: int  # slots of pairs that walk the strips of rows together
    even: bool  # columns are whole steps


@triton.jit(do_not_specialize=["stride", "slots", "groups"])
def scaled_gemm(x, x_blocks, routing, stride, slots, w, groups, out, size, HOW: tl.constexpr, TILE: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """See the module, and fused.moe_gemm for what has the same name there.

    x: Rows of uint8 [., columns / 2], x_blocks e4m3 [., columns / 16]: by token (stage 1), by pair (stage 1 with
    `by_pair`) or by place (stage 2). w: Weights as the checkpoint has them: uint8 [L, rows, columns / 2], e4m3
    [L, rows, columns / 16], and for row_scale global scales float32 [L, groups]. TILE: Grid.
    """
    ROWS: tl.constexpr = TILE.rows
    PAIRS: tl.constexpr = TILE.pairs
    pid = tl.program_id(0)
    strips = tl.num_programs(0) // slots
    slot = pid // (TILE.group * strips) * TILE.group + pid % TILE.group
    m = pid % (TILE.group * strips) // TILE.group
    wait_for_previous(PDL)
    launch_next(PDL)
    if slot < tl.load(routing.table + 3 * stride):
        e = tl.load(routing.table + slot).to(tl.int64)
        place = tl.load(routing.table + stride + slot)
        count = tl.load(routing.table + 2 * stride + slot) - place
        t = tl.arange(0, PAIRS)
        pairs = tl.load(routing.sorted_pairs + place + t, t < count, other=-1)
        r = m * ROWS + tl.arange(0, ROWS)
        dense_r, real = dense_rows(r, size.rows, HOW.gated)
        w_rows = e * size.rows + tl.where(real, dense_r, 0)
        scale = tl.load(w.row_scale + e * groups + dense_r // (size.rows // groups), real, other=0.0)
        shift = tl.zeros((ROWS,), tl.float32)
        if w.bias is not None:
            shift = tl.load(w.bias + e * size.rows + dense_r, real, other=0.0).to(tl.float32)
        x_rows = rows_of(pairs, place + t, size.top_k, HOW)
        acc = _scaled_product(x.data, x_blocks, x_rows.to(tl.int64), pairs >= 0, w.data, w.scales, w_rows, real,
                              size.columns, TILE)  # fmt: skip
        at = Spot(e, m, 0, place, count)
        epilogue(acc, scale, shift, x.scale, x_rows, pairs, place + t, w.bias, routing.weights, out, at, r, real,
                 size, HOW, ROWS, PAIRS)  # fmt: skip

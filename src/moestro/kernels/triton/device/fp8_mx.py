"""One grouped product on block-scaled tensor cores (sm_100): out[pair] = f(W[expert of pair] @ rows[pair]), rows in e4m3.

Compiled in CI for sm_100 and held to the reference in Triton's interpreter, but never run on such a chip by us.

Weights stay as the checkpoint has them: e2m1, two a byte, or e4m3, with a power of two (e8m0) per 32 columns, which the
tensor core multiplies in (`kind::mxf8f6f4`): no weight is rounded. A row of x has one float32 scale, which is left to
the epilogue; to the tensor core all its blocks have the scale 1. Rows of weights are the tensor core's 128-row operand,
pairs its other one; the epilogue, the tables of pairs and the order of rows with a gate are those of `fused.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.arguments import Spot
from moestro.kernels.triton.device.common import dense_rows, launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import epilogue, rows_of

ONE = tl.constexpr(127)  # e8m0 of 2^0


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int
    columns: int  # a step
    stages: int
    group: int  # slots of pairs that walk the strips of rows together
    even: bool  # columns are whole steps
    codes: int  # weights in a byte: 2 of e2m1, 1 of e4m3


@triton.jit
def _product(x, x_rows, there, w, w_rows, real, columns, TILE: tl.constexpr):
    """float32 [rows, pairs]: rows w_rows of w, block scales included, times the codes of rows x_rows of x."""
    ROWS: tl.constexpr = TILE.rows
    PAIRS: tl.constexpr = TILE.pairs
    BK: tl.constexpr = TILE.columns
    CODES: tl.constexpr = TILE.codes
    FORMAT: tl.constexpr = "e2m1" if CODES == 2 else "e4m3"
    if TILE.even:  # the same number: so rows are known to be aligned, and copies are asynchronous
        columns = columns // BK * BK
    byte, group, k = tl.arange(0, BK // CODES), tl.arange(0, BK // 32), tl.arange(0, BK)
    wp = w.data + w_rows[:, None] * (columns // CODES) + byte[None, :]
    ws = w.scales + w_rows[:, None] * (columns // 32) + group[None, :]
    xp = x + x_rows[:, None] * columns + k[None, :]
    ones = tl.full((PAIRS, BK // 32), ONE, tl.uint8)
    acc = tl.zeros((ROWS, PAIRS), tl.float32)
    for first in tl.range(0, columns, BK, num_stages=TILE.stages):
        left = columns - first
        w_mask, ws_mask, x_mask = real[:, None], real[:, None], there[:, None]
        if not TILE.even:
            w_mask = w_mask & (byte[None, :] < left // CODES)
            ws_mask = ws_mask & (group[None, :] < left // 32)
            x_mask = x_mask & (k[None, :] < left)
        a = tl.load(wp, w_mask, other=0.0)
        b = tl.load(xp, x_mask, other=0.0)
        a_scale = tl.load(ws, ws_mask, other=0)
        acc = tl.dot_scaled(a, a_scale, FORMAT, b.T, ones, "e4m3", acc)
        wp += BK // CODES
        ws += BK // 32
        xp += BK
    return acc


@triton.jit(do_not_specialize=["stride", "slots"])
def mx_gemm(
    x, routing, stride, slots, w, out, size, HOW: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
):
    """See the module, and fused.moe_gemm for what has the same name there.

    x: Rows of e4m3 [., columns] and float32 [.]: by token (stage 1) or by place (stage 2). w: Weights as the checkpoint
    has them, uint8 [L, rows, columns / 2] or e4m3 [L, rows, columns], and uint8 [L, rows, columns / 32]. HOW.format is
    BF16: rows of weights have no scale of their own. TILE: Grid.
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
        shift = tl.zeros((ROWS,), tl.float32)
        if w.bias is not None:
            shift = tl.load(w.bias + e * size.rows + dense_r, real, other=0.0).to(tl.float32)
        x_rows = rows_of(pairs, place + t, size.top_k, HOW)
        acc = _product(x.data, x_rows.to(tl.int64), pairs >= 0, w, w_rows, real, size.columns, TILE)
        at = Spot(e, m, 0, place, count)
        epilogue(acc, None, shift, x.scale, x_rows, pairs, place + t, w.bias, routing.weights, out, at, r, real,
                 size, HOW, ROWS, PAIRS)  # fmt: skip

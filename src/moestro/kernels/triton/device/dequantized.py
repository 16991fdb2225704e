"""Many tokens: dequantise the weights once, then a bf16 grouped matrix product over tiles of tokens.

`expand` writes what `decode.py` gives in the kernels' row order; the rest of the value, one number per row, goes into
the epilogue. `dense_gemm` has tokens as A and weights as B, both in shared memory through the tensor memory
accelerator, but x in the first product, whose rows are gathered. Tiles are walked in groups of token tiles, row tile
after row tile, so that both operands come from L2. Dense weights take the same product as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import activate, dense_rows, dot, launch_next, wait_for_previous
from moestro.kernels.triton.device.decode import BF16, decode_block
from moestro.kernels.triton.device.fused import rows_of


class Grid(NamedTuple):
    """Constants of a tile of the product."""

    pairs: int
    rows: int  # of weights
    columns: int  # a step
    stages: int
    group: int  # tiles of pairs that walk the rows together
    gather: bool  # rows of x are read by their numbers, not as one piece


@triton.jit
def expand(words, scales, dense, num_blocks, columns, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr,
           EVEN: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
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
            a = decode_block(w, tl.load(scales + at * (64 // SCALE_ROWS) + r // SCALE_ROWS), FORMAT)
            to = dense + (strip * 64 + r)[:, None] * columns + b * 64 + k[None, :]
            if EVEN:
                tl.store(to, a)
            else:
                tl.store(to, a, (b * 64 + k < columns)[None, :])


@triton.jit(do_not_specialize=["stride"])
def dense_gemm(x, x_desc, w_desc, routing, stride, w, padded, out, size, HOW: tl.constexpr, TILE: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """A tile of pairs and rows of weights [L * padded, columns] (`size.rows` of each expert's `padded` are real).

    x: Rows; w: Weights, of which w_desc holds the values. Gated rows (in stage 1 only) of a quantised format are in
    kernel row order, dense ones in two halves. TILE: Grid. The rest is as in fused.moe_gemm.
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    pid = tl.program_id(0)
    GROUP: tl.constexpr = TILE.group
    row_tiles = tl.cdiv(size.rows, TILE.rows)
    token_tiles = tl.load(routing.table + 3 * stride)
    t = pid // (GROUP * row_tiles) * GROUP + pid % GROUP
    if t < token_tiles:
        _tile(x, x_desc, w_desc, routing, stride, w, padded, out, size, t, pid % (GROUP * row_tiles) // GROUP, HOW,
              TILE)  # fmt: skip


@triton.jit
def _tile(x, x_desc, w_desc, routing, stride, w, padded, out, size, t, j, HOW: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """The t-th tile of pairs, the j-th of rows."""
    BT: tl.constexpr = TILE.pairs
    HALF: tl.constexpr = TILE.rows // 2
    HALVES: tl.constexpr = HOW.gated and HOW.format == BF16
    BK: tl.constexpr = TILE.columns
    WIDTH: tl.constexpr = HALF if HALVES else TILE.rows
    e = tl.load(routing.table + t)
    start = tl.load(routing.table + stride + t)
    places = start + tl.arange(0, BT)
    there = places < tl.load(routing.table + 2 * stride + t)
    pairs = tl.load(routing.sorted_pairs + places, there, other=0)
    x_rows = rows_of(pairs, places, size.top_k, HOW)
    k = tl.arange(0, BK)
    xp = x.data + x_rows.to(tl.int64)[:, None] * size.columns + k[None, :]
    w_row = e * padded + j * WIDTH
    acc = tl.zeros((BT, WIDTH), tl.float32)
    acc_up = tl.zeros((BT, HALF if HALVES else 16), tl.float32)
    for c in tl.range(0, size.columns, BK, num_stages=TILE.stages):
        if TILE.gather:
            a = tl.load(xp, (k < size.columns - c)[None, :], other=0.0)
            xp += BK
        else:
            a = x_desc.load([start, c])
        acc = dot(a, w_desc.load([w_row, c]).T, acc)
        if HALVES:
            acc_up = dot(a, w_desc.load([w_row + size.rows // 2, c]).T, acc_up)
    if x.scale is not None:
        scale = tl.load(x.scale + x_rows, there, other=0.0)[:, None]
        acc *= scale
        acc_up *= scale
    if HALVES:
        if w.bias is not None:
            i = j * HALF + tl.arange(0, HALF)
            bias = w.bias + e * size.rows + i
            acc += tl.load(bias, i < size.rows // 2, other=0.0).to(tl.float32)[None, :]
            acc_up += tl.load(bias + size.rows // 2, i < size.rows // 2, other=0.0).to(tl.float32)[None, :]
        _store_activated(acc, acc_up, places, there, j, out, size, HOW, HALF)
    else:
        r = j * TILE.rows + tl.arange(0, TILE.rows)
        acc = _scaled(acc, w, e, r, padded, x.scale is None, size, HOW)
        if HOW.gated:
            gate, up = acc.reshape(BT, TILE.rows // 16, 2, 8).permute(0, 1, 3, 2).split()
            _store_activated(
                gate.reshape(BT, HALF), up.reshape(BT, HALF), places, there, j, out, size, HOW, HALF
            )
        else:
            if HOW.stage == 1:
                acc = activate(acc, acc, HOW)
                to = places
            else:
                to = pairs
                if HOW.weighted:
                    acc *= tl.load(routing.weights + pairs, there, other=0.0)[:, None]
            at = out + to.to(tl.int64)[:, None] * size.out_stride + r[None, :]
            tl.store(at, acc.to(out.dtype.element_ty), mask=there[:, None] & (r < size.rows)[None, :])


@triton.jit
def _scaled(acc, w, e, r, padded, ONE_FMA: tl.constexpr, size, HOW: tl.constexpr):
    """Scales and biases of kernel rows r, rounded as fused.epilogue does."""
    dense_r, real = dense_rows(r, size.rows, HOW.gated)
    if HOW.format != BF16:
        scale = tl.load(w.row_scale + e * padded + r, r < padded, other=0.0)[None, :]
        if w.bias is None:
            acc *= scale
        else:
            shift = tl.load(w.bias + e * size.rows + dense_r, real, other=0.0).to(tl.float32)[None, :]
            if ONE_FMA:
                acc = tl.fma(acc, scale, shift)
            else:
                acc *= scale
                acc += shift
    elif w.bias is not None:
        acc += tl.load(w.bias + e * size.rows + dense_r, real, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store_activated(gate, up, places, there, j, out, size, HOW: tl.constexpr, HALF: tl.constexpr):
    """The activation of gate and up [pairs, HALF], and out."""
    i = j * HALF + tl.arange(0, HALF)
    v = activate(gate, up, HOW)
    at = out + places.to(tl.int64)[:, None] * size.out_stride + i[None, :]
    tl.store(at, v.to(out.dtype.element_ty), mask=there[:, None] & (i < size.rows // 2)[None, :])

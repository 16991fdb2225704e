"""What products with e4m3 activations on Hopper share: rows to e4m3, the tile that is written, the groups of arguments.

Pairs are the 64-row A operand and weights the B operand, both in shared memory; groups of four warps multiply 64 pairs
each and share the weights. Hopper's FP8 products keep about 14 bits of the sums they add to, so each 128 columns are a
product of their own, added in float32 registers: one block of 64 pairs x 128 rows of weights at a time, so that sums and
product fit into registers, while the other group's product keeps the tensor core busy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device import common
from moestro.kernels.triton.device.common import launch_next, wait_for_previous

async_copy, mbarrier, fence_async_shared = hopper.async_copy, hopper.mbarrier, hopper.fence_async_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # 3.9, 3.6
tma_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
activate = gluon.jit(common.activate.fn)

MOST = tl.constexpr(448.0)  # the largest e4m3
# what x has scales for: each token's row, 128 columns of it (and 128 x 128 weights), each row of sorted x
ROWS, BLOCKS, PLACES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights, 128 or 256
    groups: int  # that multiply
    parts: int  # blocks of 64 pairs of each
    decoders: int  # groups that decode weights
    stages: int
    raw: int  # buffers of codes
    group: int  # tiles of pairs that walk the strips of rows together
    recipe: int
    even: bool  # columns are whole blocks of 128
    registers: int  # of a thread that multiplies
    producer_registers: int


class Call(NamedTuple):
    """What all partitions know."""

    x: Any  # Rows
    x_desc: Any
    routing: Any
    stride: Any
    w: Any  # Weights
    w_desc: Any
    out: Any  # Rows
    size: Any
    padded: Any  # kernel rows of an expert
    tiles: Any  # of pairs
    strips: Any  # of rows


class Ring(NamedTuple):
    """Buffers in shared memory, [STAGES, ...], and their barriers."""

    x: Any
    w: Any
    full: Any
    empty: Any


class Recipe(NamedTuple):
    """Constants of quantising."""

    blocks: bool  # a scale for each 128 columns, not for the whole row
    gather: bool  # row r is of the token of pair sorted_pairs[r]
    top_k: int
    offset: int
    experts: int
    columns: int  # at a time, a multiple of 128
    turned: bool = False  # rows are whole blocks of 128 columns, in the order of fp8_cuda.cu
    whole: bool = False  # a row is at most `columns`: it is read once
    beside: bool = False  # reads nothing of the launch before this one, and runs while that does
    early: bool = False  # the next launch may begin before the one ahead of this is over
    foreign: bool = False  # rows are pairs', and some of experts of other ranks
    sorted: bool = False  # foreign: row r is of pair sorted_pairs[r], not of pair r


@triton.jit
def quantize_fp8(x, ids, sorted_pairs, data, scales, columns, HOW: tl.constexpr, PDL: tl.constexpr):
    """data e4m3 [rows, columns] = x / scale; scales float32 [rows], or [rows, blocks of 128]; a program a row.

    scale = largest magnitude / 448, or 1 where all is zero; to the nearest e4m3, ties to even. HOW: Recipe. Of pairs whose
    expert is not local, rows that are gathered stay as they are, `foreign` ones are neither read nor written. A launch that
    runs `beside` the one before it ends after that; what comes after an `early` one must wait before it reads what this one,
    or the one ahead of it, writes.
    """
    if HOW.early:
        launch_next(PDL)
    if not HOW.beside:
        wait_for_previous(PDL)
    if not HOW.early:
        launch_next(PDL)
    to = tl.program_id(0).to(tl.int64)
    row = to
    width = columns
    if HOW.gather:
        pair = tl.load(sorted_pairs + to).to(tl.int64)
        e = tl.load(ids + pair)
        width = tl.where((e >= HOW.offset) & (e < HOW.offset + HOW.experts), columns, 0)
        row = pair // HOW.top_k
    if HOW.foreign:
        e = tl.load(ids + (tl.load(sorted_pairs + to) if HOW.sorted else to))
        if (e < HOW.offset) | (e >= HOW.offset + HOW.experts):
            return
    B: tl.constexpr = HOW.columns
    c = tl.arange(0, B)
    if HOW.blocks:
        num_blocks = tl.cdiv(columns, 128)
        for first in range(0, width, B):
            v = tl.load(x + row * columns + first + c, first + c < columns, other=0.0).to(tl.float32)
            parts = v.reshape(B // 128, 128)
            scale = _scale(tl.max(tl.abs(parts), 1))
            q = tl.div_rn(parts, scale[:, None] + tl.zeros_like(parts)).reshape(B).to(tl.float8e4nv)
            tl.store(data + to * columns + first + c, q, first + c < columns)
            b = first // 128 + tl.arange(0, B // 128)
            tl.store(scales + to * num_blocks + b, scale, b < num_blocks)
    elif HOW.whole:
        at = _turned(c) if HOW.turned else c
        v = tl.load(x + row * columns + at, at < width, other=0.0).to(tl.float32)
        scale = _scale(tl.max(tl.abs(v), 0))
        tl.store(scales + to, scale)
        q = tl.div_rn(v, tl.zeros_like(v) + scale).to(tl.float8e4nv)
        out_columns = tl.cdiv(width, 128) * 128 if HOW.turned else width
        tl.store(data + to * (tl.cdiv(columns, 128) * 128 if HOW.turned else columns) + c, q, c < out_columns)
    else:
        most = tl.zeros((B,), tl.float32)
        for first in range(0, width, B):
            v = tl.load(x + row * columns + first + c, first + c < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(v))
        scale = _scale(tl.max(most, 0))
        tl.store(scales + to, scale)
        out_columns = tl.cdiv(columns, 128) * 128 if HOW.turned else columns
        for first in range(0, width, B):
            at = first + (_turned(c) if HOW.turned else c)
            v = tl.load(x + row * columns + at, at < columns, other=0.0).to(tl.float32)
            q = tl.div_rn(v, tl.zeros_like(v) + scale).to(tl.float8e4nv)
            tl.store(data + to * out_columns + first + c, q, first + c < out_columns)
    if HOW.beside:
        wait_for_previous(PDL)


@triton.jit
def _turned(place):
    """The column of a place, within each block of 128: see fp8_cuda.cu."""
    return place // 128 * 128 + place // 4 % 4 * 32 + place // 32 % 4 * 8 + place // 16 % 2 * 4 + place % 4


@triton.jit
def _scale(largest):
    """largest / 448, at least the smallest normal float32; 1 for zeros."""
    scale = tl.maximum(tl.div_rn(largest, MOST + tl.zeros_like(largest)), 1.1754943508222875e-38)
    return tl.where(largest == 0.0, 1.0, scale)


# --- the end of a tile, in Gluon --------------------------------------------------------------------------------------


@gluon.jit
def scaled(acc, call, place, there, TILE: gl.constexpr, HOW: gl.constexpr):
    """Sums times the scale of their row of x, where it has one."""
    if TILE.recipe == BLOCKS:
        return acc
    row = place
    if TILE.recipe == ROWS and HOW.stage == 1:
        row = gl.load(call.routing.sorted_pairs + place, there, other=0) // call.size.top_k
    return acc * gl.expand_dims(gl.load(call.x.scale + row, there, other=0.0), 1)


@gluon.jit
def finished(acc, call, e, first, HOW: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr):
    """Sums [64, 128] of kernel rows from `first` on -> the product's results: scales, bias, activation."""
    rows = call.size.rows
    r = first + gl.arange(0, 128, gl.SliceLayout(0, M))
    if HOW.gated:
        j = r // 16 * 8 + r % 8
        real = j < rows // 2
        j = gl.where(r % 16 < 8, j, rows // 2 + j)
    else:
        j = r
        real = r < rows
    if TILE.recipe != BLOCKS:
        at = call.w.row_scale + e.to(gl.int64) * call.padded + r
        acc *= gl.expand_dims(gl.load(at, real, other=0.0), 0)
    if call.w.bias is not None:
        acc += gl.expand_dims(gl.load(call.w.bias + e * rows + j, real, other=0.0).to(gl.float32), 0)
    if HOW.gated:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [64, 8, 2, 8]), (0, 1, 3, 2)))
        acc = gl.reshape(activate(gate, up, HOW), [64, 64])
    elif HOW.stage == 1:
        acc = activate(acc, acc, HOW)
    return acc


@gluon.jit
def quantized(v, most, call, block, place, there, HOW: gl.constexpr):
    """Results over a scale for each row's 128, which is written."""
    S: gl.constexpr = v.type.layout
    scale = gl.where(most == 0.0, 1.0, gl.maximum(most / MOST, 1.1754943508222875e-38))
    blocks = gl.cdiv(call.size.rows // 2 if HOW.gated else call.size.rows, 128)
    row = gl.convert_layout(place, gl.SliceLayout(1, S)).to(gl.int64)
    gl.store(call.out.scale + row * blocks + block, scale, gl.convert_layout(there, gl.SliceLayout(1, S)))
    return v * gl.expand_dims(1.0 / scale, 1)


@gluon.jit
def write(v, call, first, place, there, HOW: gl.constexpr, W: gl.constexpr):
    """Results [64, W] of rows from `first` on: by place in the first product, by pair in the second."""
    out = call.out.data
    v = gl.convert_layout(v.to(out.dtype.element_ty), WIDE_ROWS)
    to = place if HOW.stage == 1 else gl.load(call.routing.sorted_pairs + place, there, other=0)
    row = gl.convert_layout(to, gl.SliceLayout(1, WIDE_ROWS)).to(gl.int64)
    ok = gl.convert_layout(there, gl.SliceLayout(1, WIDE_ROWS))
    j = first + gl.arange(0, W, gl.SliceLayout(0, WIDE_ROWS))
    real = j < (call.size.rows // 2 if HOW.gated else call.size.rows)
    gl.store(out + row[:, None] * call.size.out_stride + j[None, :], v, ok[:, None] & real[None, :])


@gluon.jit
def write_block(acc, call, e, first, place, there, HOW: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr):
    """Sums of 64 pairs x 128 kernel rows from `first` on: everything up to out."""
    v = finished(scaled(acc, call, place, there, TILE, HOW), call, e, first, HOW, TILE, M)
    write(v, call, first // 2 if HOW.gated else first, place, there, HOW, 64 if HOW.gated else 128)

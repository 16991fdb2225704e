"""Activations through NVFP4, for W4A4: rows become bfloat16 e2m1 · scale (exact), or packed codes and e4m3
scales for FP4 tensor cores, and a float32 per row.

The products of e2m1 · e4m3 values are exact in float32, so a bf16 tensor core computes what an FP4 one would.
The recipe is that of formats.NVFP4.quantize_rows, division for division.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import launch_next, wait_for_previous

DYNAMIC, ONE, PER_EXPERT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where the global scale is from
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds float32 to an integer, ties to even


@triton.jit
def _nearest_e2m1(v):
    """|v| to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even code."""
    step = tl.where(v < 2.0, 0.5, tl.where(v < 4.0, 1.0, 2.0))
    return tl.minimum(((v / step + MAGIC) - MAGIC) * step, 6.0)


@triton.jit
def _nearest_e4m3(v):
    """v in 0 .. 448 to the nearest e4m3, ties to even, subnormals included."""
    power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 0.125  # 3 mantissa bits, the exponent not below -6
    return ((v / step + MAGIC) - MAGIC) * step


@triton.jit
def _global_scale(source, columns, given, e, SCALE: tl.constexpr, L: tl.constexpr, B: tl.constexpr):
    """The float32 that a row's block scales are relative to: amax / (6 · 448), or what the checkpoint gives."""
    if SCALE == DYNAMIC:
        c = tl.arange(0, B)
        most = tl.zeros((B,), tl.float32)
        for first in range(0, columns, B):
            v = tl.load(source + first + c, first + c < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(v))
        largest = tl.max(most, 0)
        scale = tl.maximum(tl.div_rn(largest, 2688.0), 1.1754943508222875e-38)
        return tl.where(largest == 0.0, 1.0, scale)
    elif SCALE == ONE:
        return tl.load(given)
    else:
        return tl.load(given + e, (e >= 0) & (e < L), other=1.0)


@triton.jit
def _through_e2m1(blocks, scale):
    """float32 [G, 16] -> (|e2m1| of each, e4m3 scale of each block [G]), both as float32."""
    amax = tl.max(tl.abs(blocks), 1)
    block = _nearest_e4m3(tl.minimum(tl.div_rn(amax, 6.0 * scale), 448.0))
    step = block * scale
    # a block whose scale rounded to zero has zero codes
    safe = tl.where(step == 0.0, 1.0, step)[:, None] + tl.zeros_like(blocks)
    ratio = tl.where(step[:, None] == 0.0, 0.0, tl.div_rn(tl.abs(blocks), safe))
    return _nearest_e2m1(ratio), block


@triton.jit
def _store_codes(q, negative, packed, first, columns, B: tl.constexpr):
    """|e2m1| [G, 16] and signs as 4-bit codes, two a byte, the even column low."""
    code = tl.where(q < 2.0, q * 2, tl.where(q < 4.0, q + 2, q * 0.5 + 4)).to(tl.int32)
    code = code | tl.where(negative, 8, 0)
    low, high = code.reshape(B // 2, 2).split()
    byte = first // 2 + tl.arange(0, B // 2)
    tl.store(packed + byte, (low | (high << 4)).to(tl.uint8), byte < columns // 2)


class Recipe(NamedTuple):
    """Constants of quantize_rows."""

    top_k: int
    offset: int
    experts: int
    scale: int  # where the global scale is from
    by_pair: bool
    sorted: bool
    packed: bool
    columns: int  # at a time
    foreign: bool = False  # rows are pairs', and some of experts of other ranks


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows(x, pairs_of, ids, given, values, block_scale, row_scale, num_rows, columns,
                  HOW: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x rows through NVFP4, one program per row r of `values`; row_scale[r] is the row's global scale.

    values [num_rows, columns] bfloat16 = e2m1 · block scale; or (packed) [num_rows, columns / 2] uint8 codes
    and block_scale [num_rows, columns / 16] e4m3.
    by_pair: row r is of pair r and reads x[r // top_k]; otherwise it reads x[r]. Under a PER_EXPERT global scale
    the expert is that of pair r, or of pairs_of[r] if sorted. Rows of foreign pairs are neither read nor written.
    """
    SCALE: tl.constexpr = HOW.scale
    B: tl.constexpr = HOW.columns
    L: tl.constexpr = HOW.experts
    wait_for_previous(PDL)
    launch_next(PDL)
    r = tl.program_id(0)
    source = x + (r // HOW.top_k if HOW.by_pair else r).to(tl.int64) * columns
    e = 0
    if SCALE == PER_EXPERT or HOW.foreign:
        e = tl.load(ids + (tl.load(pairs_of + r) if HOW.sorted else r)) - HOW.offset
    if HOW.foreign:
        nowhere = (e < 0) | (e >= L)
        if nowhere:
            return
    scale = _global_scale(source, columns, given, e, SCALE, L, B)
    tl.store(row_scale + r, scale)
    row = r.to(tl.int64)
    c = tl.arange(0, B)
    for first in range(0, columns, B):
        blocks = (
            tl.load(source + first + c, first + c < columns, other=0.0).to(tl.float32).reshape(B // 16, 16)
        )
        q, block = _through_e2m1(blocks, scale)
        if HOW.packed:
            _store_codes(q, blocks < 0, values + row * (columns // 2), first, columns, B)
            g = first // 16 + tl.arange(0, B // 16)
            at = block_scale + row * (columns // 16) + g
            tl.store(at, block.to(block_scale.dtype.element_ty), g < columns // 16)
        else:
            v = q * block[:, None]
            v = tl.where(blocks < 0, -v, v).reshape(B)
            tl.store(values + row * columns + first + c, v.to(values.dtype.element_ty), first + c < columns)


@triton.jit
def unpack_rows(packed, scale, values, columns, B: tl.constexpr, PDL: tl.constexpr):
    """values [N, columns] bfloat16 = e2m1 · scale of rows that came quantised (checkpoint layout)."""
    wait_for_previous(PDL)
    launch_next(PDL)
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    for first in range(0, columns, B):
        at = first + c
        byte = tl.load(packed + r * (columns // 2) + at // 2, at < columns, other=0).to(tl.int32)
        code = (byte >> ((at % 2) * 4)) & 15
        magnitude = code & 7
        half = (magnitude % 2 + 2 * (magnitude >= 2)).to(tl.float32) * 0.5  # 0 .5 1 1.5 1 1.5 1 1.5
        v = half * tl.where(magnitude >= 6, 4.0, tl.where(magnitude >= 4, 2.0, 1.0))
        v = tl.where(code >= 8, -v, v)
        s = tl.load(scale + r * (columns // 16) + at // 16, at < columns, other=0.0).to(tl.float32)
        tl.store(values + r * columns + at, (v * s).to(tl.bfloat16), at < columns)


@triton.jit(do_not_specialize=["size"])
def round_values(x, values, size, B: tl.constexpr, PDL: tl.constexpr):
    """values = x, rounded to the dtype of values."""
    wait_for_previous(PDL)
    launch_next(PDL)
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(values + i, tl.load(x + i, i < size, other=0.0).to(values.dtype.element_ty), i < size)

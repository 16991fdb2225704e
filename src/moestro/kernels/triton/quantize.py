"""Activations through NVFP4, for W4A4 numerics: rows become bfloat16 e2m1 · scale (exact) and a float32 per
row.

The products of e2m1 · e4m3 values are exact in float32, so a bf16 tensor core computes what an FP4 one would.
The recipe is that of formats.NVFP4.quantize_rows, division for division.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device import launch_next, wait_for_previous

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


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows(x, pairs_of, ids, given, values, row_scale, num_rows, columns, K: tl.constexpr,
                  OFFSET: tl.constexpr, L: tl.constexpr, SCALE: tl.constexpr, BY_PAIR: tl.constexpr,
                  SORTED: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """values[r] · row_scale[r] = x row through NVFP4. One program per row r of `values` [num_rows, columns].

    BY_PAIR: row r is of pair r and reads x[r // K]; otherwise it reads x[r]. Under a PER_EXPERT global scale
    the expert is that of pair r, or of pairs_of[r] if SORTED.
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    r = tl.program_id(0)
    source = x + (r // K if BY_PAIR else r).to(tl.int64) * columns
    c = tl.arange(0, B)
    if SCALE == DYNAMIC:
        most = tl.zeros((B,), tl.float32)
        for first in range(0, columns, B):
            v = tl.load(source + first + c, first + c < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(v))
        largest = tl.max(most, 0)
        scale = tl.maximum(tl.div_rn(largest, 2688.0), 1.1754943508222875e-38)
        scale = tl.where(largest == 0.0, 1.0, scale)
    elif SCALE == ONE:
        scale = tl.load(given)
    else:
        e = tl.load(ids + (tl.load(pairs_of + r) if SORTED else r)) - OFFSET
        scale = tl.load(given + e, (e >= 0) & (e < L), other=1.0)
    tl.store(row_scale + r, scale)
    for first in range(0, columns, B):
        blocks = (
            tl.load(source + first + c, first + c < columns, other=0.0).to(tl.float32).reshape(B // 16, 16)
        )
        amax = tl.max(tl.abs(blocks), 1)
        block = _nearest_e4m3(tl.minimum(tl.div_rn(amax, 6.0 * scale), 448.0))
        step = block * scale
        # a block whose scale rounded to zero has zero codes
        safe = tl.where(step == 0.0, 1.0, step)[:, None] + tl.zeros_like(blocks)
        ratio = tl.where(step[:, None] == 0.0, 0.0, tl.div_rn(tl.abs(blocks), safe))
        q = _nearest_e2m1(ratio) * block[:, None]
        q = tl.where(blocks < 0, -q, q).reshape(B)
        tl.store(values + r.to(tl.int64) * columns + first + c, q.to(tl.bfloat16), first + c < columns)


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

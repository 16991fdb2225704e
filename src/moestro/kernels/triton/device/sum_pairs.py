"""The end of a call: sum each token's pairs in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import launch_next, wait_for_previous


@triton.jit(do_not_specialize=["num_done"])
def sum_pairs(partial, ids, pair_weights, out, done, num_done, H, OFFSET: tl.constexpr, L: tl.constexpr,
              K: tl.constexpr, SPLIT: tl.constexpr, LINE: tl.constexpr, BH: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """out[n] = Σ partial[(n * K + k) * SPLIT + s] over k, then s, in float32; pairs not local are not read.

    pair_weights: float32 [N, K] where the products have not multiplied by them, else None. Clears the counters
    done, int32 [num_done, LINE] (chain.py), unless that is None.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    here = tl.zeros((), tl.int64)  # bit k: pair k is local
    for k in tl.static_range(K):
        e = tl.load(ids + n * K + k)  # older than the kernel before this one
        here |= ((e >= OFFSET) & (e < OFFSET + L)).to(tl.int64) << k
    wait_for_previous(PDL)
    launch_next(PDL)
    if done is not None:
        me = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for first in range(me * BH, num_done, tl.num_programs(0) * tl.num_programs(1) * BH):
            i = first + tl.arange(0, BH)
            tl.store(done + i * LINE, tl.zeros((BH,), tl.int32), i < num_done)
    acc = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        width = tl.where((here >> k) & 1 == 1, H, 0)
        for s in tl.static_range(SPLIT):
            row = partial + ((n * K + k) * SPLIT + s) * H
            value = tl.load(row + h, h < width, other=0.0).to(tl.float32)
            if pair_weights is not None:
                value *= tl.load(pair_weights + n * K + k)
            acc += value
    tl.store(out + n * H + h, acc.to(out.dtype.element_ty), h < H)

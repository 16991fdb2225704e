"""The end of a call of `warp_specialized.py`: sum each token's pairs, weighted, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import launch_next, wait_for_previous


@triton.jit
def sum_weighted(partial, ids, pair_weights, out, H, OFFSET: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
                 BH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[n] = Σ pair_weights[n, k] · partial[n * K + k] over k, in float32; pairs not local are not read."""
    wait_for_previous(PDL)
    launch_next(PDL)
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids + n * K + k)
        width = tl.where((e >= OFFSET) & (e < OFFSET + L), H, 0)
        weight = tl.load(pair_weights + n * K + k)
        acc += weight * tl.load(partial + (n * K + k) * H + h, h < width, other=0.0).to(tl.float32)
    tl.store(out + n * H + h, acc.to(out.dtype.element_ty), h < H)

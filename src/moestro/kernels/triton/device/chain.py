"""Both products of few tokens in one launch, so that memory never waits between them.

The first programs are the first product's tiles, the rest the second's, in the same order of experts. A tile
of the second product waits until the first product's tiles of the same pairs are counted in `done`: those
programs have lower numbers, and a GPU starts programs in the order of their numbers, so what is waited for
is running or over. While the last tiles of the first product drain, the second product's are at work on the
experts that are complete; one that must wait asks L2 for its weights first.

`done` is zero between calls: the kernel that sums the pairs clears it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import PARTIAL, find, tiles

LINE = 32  # int32 from counter to counter: each has a line of its own, so that they lie all over L2


@triton.jit
def _place(at, per_group, GROUP: tl.constexpr):
    """(slot, place within it) of the at-th program of a product: GROUP slots walk their strips together."""
    return at // per_group * GROUP + at % GROUP, at % per_group // GROUP


@triton.jit(do_not_specialize=["stride", "P", "slots", "OFFSET", "L", "K"])
def moe_chain(
    x, ids, pair_weights, sorted_pairs, table, stride, done,
    w1, w1_scales, row_scale1, bias1, act, w2, w2_scales, row_scale2, bias2, partial,
    P, slots, rows1, hidden, inter, OFFSET, L, K,
    ROUTE: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, EVEN1: tl.constexpr, EVEN2: tl.constexpr,
    PB: tl.constexpr, BN: tl.constexpr, LADDER: tl.constexpr,
    BM1: tl.constexpr, UNROLL1: tl.constexpr, STAGES1: tl.constexpr,
    BM2: tl.constexpr, UNROLL2: tl.constexpr, STAGES2: tl.constexpr,
    STRIPS1: tl.constexpr, STRIPS2: tl.constexpr,
    SPLIT: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The arguments are gemm.moe_gemm's for its two stages; done int32 [slots, LINE], zero.

    STRIPS1, STRIPS2: tiles of a slot in each product (those of the second times SPLIT).
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    pid = tl.program_id(0)
    if pid < slots * STRIPS1:
        slot, m = _place(pid, GROUP * STRIPS1, GROUP)
        e, place, count = find(ids, table, stride, slot, P, OFFSET, L, ROUTE, BN)
        if e >= 0:
            args = (x, x, ids, pair_weights, sorted_pairs, w1, w1_scales, row_scale1, bias1, act, P, rows1,
                    hidden, inter, OFFSET, K, e, m, 0, place, count, done + slot * LINE, STRIPS1)  # fmt: skip
            tiles(args, count, 1, ROUTE, PARTIAL, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS1, False,
                  False, EVEN1, PB, BM1, BN, LADDER, UNROLL1, STAGES1, 1, TOGETHER, False, True,
                  0)  # fmt: skip
    else:
        slot, m = _place(pid - slots * STRIPS1, GROUP * STRIPS2, GROUP)
        e, place, count = find(ids, table, stride, slot, P, OFFSET, L, ROUTE, BN)
        if e >= 0:
            args = (act, act, ids, pair_weights, sorted_pairs, w2, w2_scales, row_scale2, bias2, partial, P,
                    hidden, inter, hidden, OFFSET, K, e, m // SPLIT, m % SPLIT, place, count,
                    done + slot * LINE, STRIPS1)  # fmt: skip
            tiles(args, count, 2, ROUTE, PARTIAL, FORMAT, False, ACT, ALPHA, LIMIT, SHIFT, BIAS2, False,
                  False, EVEN2, PB, BM2, BN, LADDER, UNROLL2, STAGES2, SPLIT, TOGETHER, False, True,
                  AHEAD)  # fmt: skip

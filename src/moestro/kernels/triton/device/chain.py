"""Both products of few tokens in one launch, so that memory never waits between them.

The first programs are the first product's tiles, the rest the second's, in the same order of experts. A tile
of the second product waits until the first product's tiles of the same pairs are counted in `done`: those
programs have lower numbers, and a GPU starts programs in the order of their numbers, so what is waited for
is running or over. While the last tiles of the first product drain, the second product's are at work on the
experts that are complete; one that must wait asks L2 for its weights first.

`done` is zero between calls: the kernel that sums the pairs clears it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.arguments import Product, Rows, Schedule, Signal, Size, Spot
from moestro.kernels.triton.device.common import launch_next, wait_for_previous
from moestro.kernels.triton.device.fused import find, tiles

LINE = 32  # int32 from counter to counter: each has a line of its own, so that they lie all over L2


class Chain(NamedTuple):
    """Constants of a chain: both products, and the tiles of a slot in each (those of the second times split_k)."""

    first: Product
    second: Product
    tile1: Schedule
    tile2: Schedule
    strips1: int
    strips2: int
    line: int


@triton.jit
def _place(at, per_group, GROUP: tl.constexpr):
    """(slot, place within it) of the at-th program of a product: GROUP slots walk their strips together."""
    return at // per_group * GROUP + at % GROUP, at % per_group // GROUP


@triton.jit(do_not_specialize=["stride", "num_pairs", "slots"])
def moe_chain(x, routing, stride, num_pairs, slots, w, out, done, size, HOW: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """The arguments are fused.moe_gemm's; w, out: Both; size: of the first product; done int32 [slots, LINE], zero.

    HOW: Chain.
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    FIRST: tl.constexpr = HOW.first
    SECOND: tl.constexpr = HOW.second
    TILE1: tl.constexpr = HOW.tile1
    TILE2: tl.constexpr = HOW.tile2
    STRIPS1: tl.constexpr = HOW.strips1
    GROUP: tl.constexpr = TILE1.group
    SPLIT: tl.constexpr = SECOND.split_k
    pid = tl.program_id(0)
    if pid < slots * STRIPS1:
        slot, m = _place(pid, GROUP * STRIPS1, GROUP)
        e, place, count = find(routing, stride, num_pairs, slot, size, TILE1)
        if e >= 0:
            at = Spot(e, m, 0, place, count)
            signal = Signal(done + slot * HOW.line, STRIPS1)
            tiles(x, routing, num_pairs, w.first, out.first, size, at, signal, FIRST, TILE1, False)
    else:
        slot, m = _place(pid - slots * STRIPS1, GROUP * HOW.strips2, GROUP)
        e, place, count = find(routing, stride, num_pairs, slot, size, TILE2)
        if e >= 0:
            at = Spot(e, m // SPLIT, m % SPLIT, place, count)
            signal = Signal(done + slot * HOW.line, STRIPS1)
            act = Rows(out.first, None)
            size2 = Size(size.columns, size.out_stride, size.columns, size.offset, size.experts, size.top_k)
            tiles(act, routing, num_pairs, w.second, out.second, size2, at, signal, SECOND, TILE2, False)

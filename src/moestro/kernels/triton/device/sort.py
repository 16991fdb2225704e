"""Sort pairs by expert and cut them into tiles of tokens, on the device: one launch for few pairs, two for
many.

Pair p is (token p // K, slot p % K). `count` makes one histogram per chunk of pairs; `place` turns the
histograms into places. Within an expert the order of pairs is whatever the atomic counter gives: no result
depends on it, since every pair has its own row and its own sums.

Pairs of experts that are not local count as one more expert, L, which gets no tile.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import launch_next, wait_for_previous

CHUNK = 2048  # pairs of one program


class Local(NamedTuple):
    """Constants: the experts of this rank, and bins of a histogram for them and one more."""

    offset: int
    experts: int
    bins: int


@triton.jit
def _local(ids, p, P, OFFSET: tl.constexpr, L: tl.constexpr):
    """Local expert of pairs p; L where the expert is of another rank, or nowhere."""
    e = tl.load(ids + p, p < P, other=-1)
    inside = (e >= OFFSET) & (e < OFFSET + L)
    return tl.where(inside, e - OFFSET, L)


@triton.jit(do_not_specialize=["P"])
def count(ids, counts, P, LOCAL: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """counts [chunks, bins] int32: pairs of each local expert in each chunk."""
    LB: tl.constexpr = LOCAL.bins
    wait_for_previous(PDL)
    launch_next(PDL)
    c = tl.program_id(0)
    p = c * CHUNK + tl.arange(0, CHUNK)
    e = _local(ids, p, P, LOCAL.offset, LOCAL.experts)
    tl.store(counts + c * LB + tl.arange(0, LB), tl.histogram(e, LB))


@triton.jit
def _cut(table, stride, totals, starts, bins, BN, L: tl.constexpr, BY_SIZE: tl.constexpr):
    """Write the tiles of BN pairs: rows [expert], [start], [end of the expert] of table, then their
    number. BY_SIZE: what is left of an expert and fills less than half a tile comes after all others, by size."""
    there = bins < L
    if BY_SIZE:
        tiles = tl.where(there, (totals + BN // 2) // BN, 0)
        rest = tl.where(there, tl.maximum(totals - tiles * BN, 0), 0)
    else:
        tiles = tl.where(there, (totals + BN - 1) // BN, 0)
    first = table + tl.cumsum(tiles, 0) - tiles
    number = tl.sum(tiles, 0)
    for i in range(tl.max(tiles, 0)):
        here = i < tiles
        tl.store(first + i, bins, here)
        tl.store(first + stride + i, starts + i * BN, here)
        tl.store(first + 2 * stride + i, starts + totals, here)
    if BY_SIZE:
        eighth = tl.where(rest > 0, 3 - (rest - 1) * 8 // BN, 4)  # of a tile, the largest first
        sizes = tl.arange(0, 4)
        of_size = (eighth[:, None] == sizes[None, :]).to(tl.int32)
        many = tl.sum(of_size, 0)
        before = tl.cumsum(of_size, 0) - of_size + (tl.cumsum(many, 0) - many)[None, :]
        last = table + number + tl.sum(of_size * before, 1)
        tl.store(last, bins, rest > 0)
        tl.store(last + stride, starts + tiles * BN, rest > 0)
        tl.store(last + 2 * stride, starts + totals, rest > 0)
        number += tl.sum(many, 0)
    tl.store(table + 3 * stride, number)


@triton.jit(do_not_specialize=["P", "num_chunks", "stride1", "stride2", "BN1", "BN2"])
def place(ids, counts, cursors, sorted_pairs, tables, stride1, stride2, P, num_chunks, BN1, BN2,
          LOCAL: tl.constexpr, CHUNK: tl.constexpr, BY_SIZE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """sorted_pairs [P] (pairs by expert; those of no local expert last), and two tables of tiles of them.

    A table is int32 [3 * stride + 1]; tile t is of expert table[t] and covers sorted_pairs from
    table[stride + t] to BN further, or to table[2 * stride + t] if that is less; table[3 * stride] is how
    many there are. counts is read if there is more than one chunk. BN1 and BN2 are not constants of the kernel:
    tuning would compile one for each pair of widths. BY_SIZE (see _cut) suits programs that share tiles out by number.
    """
    LB: tl.constexpr = LOCAL.bins
    wait_for_previous(PDL)
    launch_next(PDL)
    c = tl.program_id(0)
    p = c * CHUNK + tl.arange(0, CHUNK)
    e = _local(ids, p, P, LOCAL.offset, LOCAL.experts)
    bins = tl.arange(0, LB)
    if num_chunks == 1:
        total = tl.histogram(e, LB)
        before = tl.zeros((LB,), tl.int32)
    else:
        total = tl.zeros((LB,), tl.int32)
        before = tl.zeros((LB,), tl.int32)
        rows = tl.arange(0, 16)
        for first in range(0, num_chunks, 16):
            r = first + rows
            h = tl.load(counts + r[:, None] * LB + bins[None, :], (r < num_chunks)[:, None], other=0)
            total += tl.sum(h, 0)
            before += tl.sum(tl.where((r < c)[:, None], h, 0), 0)
    ends = tl.cumsum(total, 0)
    starts = ends - total
    tl.store(cursors + c * LB + bins, starts + before)
    tl.debug_barrier()
    at = tl.atomic_add(cursors + c * LB + e, 1, mask=p < P, sem="relaxed")
    tl.store(sorted_pairs + at, p, p < P)
    if c == 0:
        _cut(tables.first, stride1, total, starts, bins, BN1, LOCAL.experts, BY_SIZE)
        if BN2 != BN1:
            _cut(tables.second, stride2, total, starts, bins, BN2, LOCAL.experts, BY_SIZE)

"""One grouped matrix product for every weight format: out[pair] = f(W[expert of pair] @ rows[pair]).

Swap-AB: rows of weights are the A operand, up to `pairs` pairs of one expert the B operand, so that few tokens
still use the tensor cores, and quantised weights are decoded in the registers that feed them. 64 rows or more with
four warps and 16 pairs or more give wgmma with A in registers, less gives mma.sync, which needs no waiting between
products and adds in another order.

Stage 1 gathers x, and its epilogue is bias and activation; stage 2 reads the intermediate, and its epilogue
is bias and routing weight. A program finds its pairs in the tables of `sort.py`; or (DIRECT, few pairs) by
itself: slot s belongs to pair s, and works if s is the first of `pairs` pairs of its expert; or (SINGLE) it has
pair s alone.

A tile is as wide as it need be: where its schedule is `narrow`, one of fewer pairs runs a loop for a quarter, a
half or three quarters of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.arguments import Spot
from moestro.kernels.triton.device.common import (
    activate,
    dense_rows,
    dot,
    launch_next,
    row_blocks,
    wait_for_count,
    wait_for_previous,
    wait_for_products,
)
from moestro.kernels.triton.device.decode import BF16, decode_block

DIRECT, SORTED, SINGLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _direct_pairs(ids, slot, e, num_pairs, offset, PAIRS: tl.constexpr, SEARCH: tl.constexpr):
    """(whether slot is the first of PAIRS pairs of its expert e; those pairs, -1 where there is none)."""
    p = tl.arange(0, SEARCH)
    same = (tl.load(ids + p, p < num_pairs, other=-1) - offset == e) & (p < num_pairs)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    mine = tl.sum((same & (p < slot)).to(tl.int32), 0)
    wanted = mine + tl.arange(0, PAIRS)
    hit = same[:, None] & (rank[:, None] == wanted[None, :])
    return mine % PAIRS == 0, tl.sum(tl.where(hit, p[:, None] + 1, 0), 0) - 1


@triton.jit(do_not_specialize=["stride", "num_pairs", "slots"])
def moe_gemm(x, routing, stride, num_pairs, slots, w, out, size, HOW: tl.constexpr, TILE: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """See the module, and arguments.py for the groups: Rows, Routing, Weights, Size, Product, Schedule.

    x rows: by token (stage 1; by pair with `by_pair`), by pair or place (stage 2, as stage 1 wrote them).
    out: stage 1 [num_pairs, out_stride]; stage 2 [num_pairs * split_k, out_stride] by pair and part. slots: a
    multiple of the group, which walks the strips of rows together.
    """
    pid = tl.program_id(0)
    strips = tl.num_programs(0) // slots  # times split_k
    slot = pid // (TILE.group * strips) * TILE.group + pid % TILE.group
    m = pid % (TILE.group * strips) // TILE.group
    if HOW.stage == 1:  # stage 2 needs the pairs, which are there already, before it waits for stage 1
        wait_for_previous(PDL)
    e, place, count = find(routing, stride, num_pairs, slot, size, TILE)
    if e < 0:
        wait_for_previous(PDL)  # a launch must not be over before those that it waits for
        return
    at = Spot(e, m // HOW.split_k, m % HOW.split_k, place, count)
    tiles(x, routing, num_pairs, w, out, size, at, None, HOW, TILE, PDL)


@triton.jit
def find(routing, stride, num_pairs, slot, size, TILE: tl.constexpr):
    """(local expert of a slot, -1 if it has no work; its place among the pairs; how many pairs)."""
    if TILE.route == SORTED:
        table = routing.table
        at = table + tl.minimum(slot, stride - 1)  # loads that do not wait for each other
        works = slot < tl.load(table + 3 * stride, cache_modifier=".cg")
        e = tl.load(at, cache_modifier=".cg")
        start = tl.load(at + stride, cache_modifier=".cg")
        count = tl.load(at + 2 * stride, cache_modifier=".cg") - start
        return tl.where(works, e, -1), start, count
    else:
        e = tl.load(routing.ids + slot, slot < num_pairs, other=-1, cache_modifier=".cg") - size.offset
        e = tl.where((e < 0) | (e >= size.experts), -1, e)
        return e, slot, e * 0 + TILE.pairs


@triton.jit
def tiles(x, routing, num_pairs, w, out, size, at, done, HOW: tl.constexpr, TILE: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """_tile, as wide as the spot's count of pairs needs. done: None, or the Signal of a chain."""
    QUARTER: tl.constexpr = TILE.pairs // 4
    if TILE.narrow and at.count <= QUARTER:
        _tile(x, routing, num_pairs, w, out, size, at, done, HOW, TILE, QUARTER, 0, PDL)
    elif TILE.narrow and at.count <= 2 * QUARTER:
        _tile(x, routing, num_pairs, w, out, size, at, done, HOW, TILE, 2 * QUARTER, 0, PDL)
    elif TILE.narrow and at.count <= 3 * QUARTER:
        _tile(x, routing, num_pairs, w, out, size, at, done, HOW, TILE, 2 * QUARTER, QUARTER, PDL)
    else:
        _tile(x, routing, num_pairs, w, out, size, at, done, HOW, TILE, TILE.pairs, 0, PDL)


@triton.jit
def _tile(x, routing, num_pairs, w, out, size, at, done, HOW: tl.constexpr, TILE: tl.constexpr,
          WIDTH: tl.constexpr, MORE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """TILE.rows rows of an expert for WIDTH pairs, and MORE where that is not 0 (B operands are powers of two
    wide). done: with a Signal, both products are one launch (see chain.py)."""
    ROWS: tl.constexpr = TILE.rows
    WIDTH2: tl.constexpr = MORE if MORE > 0 else WIDTH
    first = tl.arange(0, WIDTH)
    second = WIDTH + tl.arange(0, WIDTH2)
    works = True
    if TILE.route == SORTED:
        of_tile = routing.sorted_pairs + at.place
        pairs = tl.load(of_tile + first, first < at.count, other=-1, cache_modifier=".cg")
        places = at.place + first
    elif TILE.route == SINGLE:
        pairs = tl.where(first == 0, at.place, -1)
        places = pairs
    else:
        works, pairs = _direct_pairs(
            routing.ids, at.place, at.expert, num_pairs, size.offset, WIDTH, TILE.search
        )
        places = pairs
    if MORE > 0:
        of_tile = routing.sorted_pairs + at.place
        pairs2 = tl.load(of_tile + second, second < at.count, other=-1, cache_modifier=".cg")
    else:
        pairs2 = second
    if works:
        r = at.strip * TILE.rows + tl.arange(0, TILE.rows)
        dense_r, real = dense_rows(r, size.rows, HOW.gated)
        # what the epilogue needs is asked for before the loop, which hides its way from memory
        if HOW.format != BF16:
            padded = row_blocks(size.rows, HOW.gated) * 64
            scale = tl.load(w.row_scale + at.expert.to(tl.int64) * padded + r, real, other=0.0)
        else:
            scale = tl.full((ROWS,), 1.0, tl.float32)
        if w.bias is not None:
            shift = tl.load(w.bias + at.expert * size.rows + dense_r, real, other=0.0).to(tl.float32)
            shift = tl.where(at.part == 0, shift, 0.0)
        else:
            shift = tl.zeros((ROWS,), tl.float32)
        if HOW.stage == 2:
            if done is not None:
                _wait_for_tiles(done, w, at, size, HOW, TILE)
            else:
                wait_for_previous(PDL)
        if done is None:
            launch_next(PDL)
        x_rows = rows_of(pairs, places, size.top_k, HOW)
        x_rows2 = rows_of(pairs2, at.place + second, size.top_k, HOW)
        acc, acc2 = _product(x.data, x_rows, pairs >= 0, x_rows2, pairs2 >= 0, w, at, size, HOW, TILE, WIDTH,
                             MORE)  # fmt: skip
        epilogue(acc, scale, shift, x.scale, x_rows, pairs, places, w.bias, routing.weights, out, at, r, real,
                 size, HOW, TILE.rows, WIDTH)  # fmt: skip
        if MORE > 0:
            epilogue(acc2, scale, shift, x.scale, x_rows2, pairs2, at.place + second, w.bias, routing.weights,
                     out, at, r, real, size, HOW, TILE.rows, MORE)  # fmt: skip
        if done is not None and HOW.stage == 1:
            tl.debug_barrier()  # every thread's part of the tile is written before one thread says so
            tl.atomic_add(done.counter, 1, sem="release")


@triton.jit
def _wait_for_tiles(done, w, at, size, HOW: tl.constexpr, TILE: tl.constexpr):
    """Until all strips of the first product of these pairs are done; the weights' first bytes are asked into L2
    meanwhile."""
    PREFETCH: tl.constexpr = TILE.prefetch
    if HOW.format != BF16 and PREFETCH > 0:
        blocks = tl.cdiv(size.columns, 64)
        each = blocks // HOW.split_k
        strips = at.expert.to(tl.int64) * tl.cdiv(size.rows, 64) + at.strip * TILE.rows // 64
        block = strips * blocks + at.part * each
        WORD: tl.constexpr = w.data.dtype.element_ty.primitive_bitwidth // 8
        SCALES: tl.constexpr = 64 // HOW.scale_rows
        SCALE: tl.constexpr = w.scales.dtype.element_ty.primitive_bitwidth // 8
        number = tl.minimum(each, PREFETCH // (1024 * WORD))
        wait_for_count(done.counter, done.wanted, w.data + block * 1024, number * (1024 * WORD),
                       w.scales + block * SCALES, number * (SCALES * SCALE))  # fmt: skip
    else:
        wait_for_count(done.counter, done.wanted, done.counter, 0, done.counter, 0)


@triton.jit
def rows_of(pairs, places, top_k, HOW: tl.constexpr):
    """Rows of x that pairs read; 0 where there is no pair."""
    if HOW.stage == 2:
        rows = places
    elif HOW.by_pair:
        rows = pairs
    else:
        rows = pairs // top_k
    return tl.where(pairs >= 0, rows, 0)


@triton.jit
def epilogue(acc, scale, shift, x_scale, x_rows, pairs, places, bias, pair_weights, out, at, r, real, size,
             HOW: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Scales, bias, then the activation (stage 1) or the routing weight (stage 2), and out.

    A scale and a bias are one fma, and not the compiler's choice, so that all tiles and paths round alike.
    """
    there = pairs >= 0
    if HOW.format != BF16 and x_scale is None and bias is not None:
        acc = tl.fma(acc, scale[:, None], shift[:, None])
    else:
        if HOW.format != BF16:
            acc *= scale[:, None]
        if x_scale is not None:
            acc *= tl.load(x_scale + x_rows, there, other=0.0)[None, :]
        if bias is not None:
            acc += shift[:, None]
    if HOW.stage == 1:
        _store_activated(acc, out, places, there, at.strip, size, HOW, ROWS, PAIRS)
    else:
        if HOW.weighted:
            acc *= tl.load(pair_weights + pairs, there, other=0.0)[None, :]
        row = (pairs * HOW.split_k + at.part).to(tl.int64)
        to = out + row[None, :] * size.out_stride + r[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=real[:, None] & there[None, :])


@triton.jit
def _product(x, x_rows, there, x_rows2, there2, w, at, size, HOW: tl.constexpr, TILE: tl.constexpr,
             WIDTH: tl.constexpr, MORE: tl.constexpr):  # fmt: skip
    """float32 [rows, WIDTH] and [rows, MORE]: a strip of an expert's kernel rows, times rows of x.

    Of the blocks of 64 columns, it does one part of split_k equal ones; k_blocks divides those.
    """
    ROWS: tl.constexpr = TILE.rows
    WIDTH2: tl.constexpr = MORE if MORE > 0 else 16
    UNROLL: tl.constexpr = TILE.k_blocks
    PACKED: tl.constexpr = HOW.format != BF16
    W_STEP: tl.constexpr = 1024 if PACKED else 64  # elements of a block of one row's strip
    S_STEP: tl.constexpr = 64 // HOW.scale_rows
    e = at.expert.to(tl.int64)
    columns = size.columns
    k = tl.arange(0, 64)
    r = at.strip * TILE.rows + tl.arange(0, TILE.rows)
    blocks = tl.cdiv(columns, 64)
    xp = x + x_rows.to(tl.int64)[None, :] * columns + k[:, None]
    xp2 = x + x_rows2.to(tl.int64)[None, :] * columns + k[:, None]
    if PACKED:
        of_expert = row_blocks(size.rows, HOW.gated)
        strip = tl.minimum(r // 64, of_expert - 1) * blocks  # the last strip again where rows overhang
        word = tl.arange(0, 16)
        wp = (
            w.data
            + e * (of_expert * blocks) * 1024
            + strip[:, None] * 1024
            + (r % 64)[:, None] * 16
            + word[None, :]
        )
        sp = w.scales + e * (of_expert * blocks) * S_STEP + strip * S_STEP + r % 64 // HOW.scale_rows
    else:
        dense_r, real = dense_rows(r, size.rows, HOW.gated)
        row = tl.where(real, dense_r, 0).to(tl.int64)
        wp = w.data + e * size.rows * columns + row[:, None] * columns + k[None, :]
        sp = wp
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    acc2 = tl.zeros((ROWS, WIDTH2), tl.float32)
    first = 0
    last = blocks
    if HOW.split_k > 1:
        first = at.part * (blocks // HOW.split_k)
        last = first + blocks // HOW.split_k
        xp += first * 64
        xp2 += first * 64
        wp += first * W_STEP
        if PACKED:
            sp += first * S_STEP
    for b in tl.range(first, last, UNROLL, num_stages=TILE.stages):
        for u in tl.static_range(UNROLL):
            left = columns - (b + u) * 64
            x_mask = there[None, :]
            x_mask2 = there2[None, :]
            if not HOW.even:
                x_mask = x_mask & (k[:, None] < left)
                x_mask2 = x_mask2 & (k[:, None] < left)
            if PACKED:
                a = decode_block(tl.load(wp + u * 1024), tl.load(sp + u * S_STEP), HOW.format)
            elif HOW.even:
                a = tl.load(wp + u * 64)
            else:
                a = tl.load(wp + u * 64, k[None, :] < left, other=0.0)
            acc = dot(a, tl.load(xp + u * 64, x_mask, other=0.0), acc)
            if MORE > 0:
                acc2 = dot(a, tl.load(xp2 + u * 64, x_mask2, other=0.0), acc2)
        if PACKED:
            if TILE.overlap:
                acc = wait_for_products(acc)
                if MORE > 0:
                    acc2 = wait_for_products(acc2)
            wp += UNROLL * 1024
            sp += UNROLL * S_STEP
        else:
            wp += UNROLL * 64
        xp += UNROLL * 64
        xp2 += UNROLL * 64
    return acc, acc2


@triton.jit
def _store_activated(acc, out, places, there, strip, size, HOW: tl.constexpr, ROWS: tl.constexpr,
                     PAIRS: tl.constexpr):  # fmt: skip
    """Activate float32 [ROWS, PAIRS] and write it to out[place]. Gate and up rows meet in one thread."""
    if HOW.gated:
        HALF: tl.constexpr = ROWS // 2
        gate, up = acc.reshape(ROWS // 16, 2, 8, PAIRS).permute(0, 2, 3, 1).split()
        a = activate(gate, up, HOW).reshape(HALF, PAIRS)
        j = strip * HALF + tl.arange(0, HALF)
        real = j < size.rows // 2
    else:
        a = activate(acc, acc, HOW)
        j = strip * ROWS + tl.arange(0, ROWS)
        real = j < size.rows
    to = out + places.to(tl.int64)[None, :] * size.out_stride + j[:, None]
    tl.store(to, a.to(out.dtype.element_ty), real[:, None] & there[None, :])

"""One grouped matrix product for every weight format: out[pair] = f(W[expert of pair] @ rows[pair]).

Swap-AB: BM rows of weights are the A operand, up to BN pairs of one expert the B operand, so that few tokens
still use the tensor cores, and quantised weights are decoded in the registers that feed them. BM >= 64 with
four warps or more gives wgmma with A in registers, less gives mma.sync, which needs no waiting between
products.

STAGE 1 gathers x, and its epilogue is bias and activation; STAGE 2 reads the intermediate, and its epilogue
is bias and routing weight. A program finds its pairs in the tables of `sort.py`; or (DIRECT, few pairs) by
itself: slot s belongs to pair s, and works if s is the first of BN pairs of its expert; or (SINGLE) it has
pair s alone.

A tile is as wide as it need be: with LADDER, one that has fewer than BN pairs runs a loop for a quarter, a
half or three quarters of BN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import (
    NVFP4,
    activate,
    decode_block,
    dot,
    launch_next,
    settle,
    wait_for_count,
    wait_for_previous,
)

DIRECT, SORTED, SINGLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PARTIAL, ATOMIC = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _direct_pairs(ids, slot, e, P, OFFSET, BN: tl.constexpr, PB: tl.constexpr):
    """(whether slot is the first of BN pairs of its expert e; those pairs, -1 where there is none)."""
    p = tl.arange(0, PB)
    same = (tl.load(ids + p, p < P, other=-1) - OFFSET == e) & (p < P)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    mine = tl.sum((same & (p < slot)).to(tl.int32), 0)
    wanted = mine + tl.arange(0, BN)
    hit = same[:, None] & (rank[:, None] == wanted[None, :])
    return mine % BN == 0, tl.sum(tl.where(hit, p[:, None] + 1, 0), 0) - 1


@triton.jit
def _dense_rows(r, rows, GATED: tl.constexpr):
    """(checkpoint row of kernel row r (8 of gate, 8 of up, alternating), whether there is one)."""
    if GATED:
        j = (r // 16) * 8 + r % 8
        return tl.where(r % 16 < 8, j, rows // 2 + j), j < rows // 2
    else:
        return r, r < rows


@triton.jit(do_not_specialize=["stride", "P", "slots", "num_zeros", "OFFSET", "L", "K"])
def moe_gemm(
    x, x_scale, ids, pair_weights, sorted_pairs, table, stride,
    w, w_scales, row_scale, bias, out, zeros,
    P, slots, rows, columns, out_stride, num_zeros, OFFSET, L, K,
    STAGE: tl.constexpr, ROUTE: tl.constexpr, COMBINE: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, EVEN: tl.constexpr,
    PB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LADDER: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module. Kernel rows are in `layout.row_order`; `rows`, `columns` are the checkpoint's.

    x rows of `columns` values: by token (STAGE 1), by pair or place (STAGE 2, as STAGE 1 wrote them).
    x_scale float32: of each row of x, if X_SCALE. out: STAGE 1 [P, out_stride] in its dtype; STAGE 2 PARTIAL
    [P * SPLIT, out_stride] by pair and part, ATOMIC float32 [N, out_stride]. zeros: float32 [num_zeros] to
    clear for an ATOMIC STAGE 2, which may SPLIT the columns. GROUP slots walk the strips of BM rows together.
    """
    pid = tl.program_id(0)
    strips = tl.num_programs(0) // slots  # times SPLIT; slots is a multiple of GROUP
    slot = pid // (GROUP * strips) * GROUP + pid % GROUP
    m = pid % (GROUP * strips) // GROUP
    part = m % SPLIT
    m = m // SPLIT
    if STAGE == 1:  # STAGE 2 needs the pairs, which are there already, before it waits for STAGE 1
        wait_for_previous(PDL)
    if STAGE == 1 and COMBINE == ATOMIC:
        for first in range(pid * 1024, num_zeros, tl.num_programs(0) * 1024):
            i = first + tl.arange(0, 1024)
            tl.store(zeros + i, tl.zeros((1024,), tl.float32), i < num_zeros)
    e, place, count = find(ids, table, stride, slot, P, OFFSET, L, ROUTE, BN)
    if e < 0:
        wait_for_previous(PDL)  # a launch must not be over before those that it waits for
        return
    args = (x, x_scale, ids, pair_weights, sorted_pairs, w, w_scales, row_scale, bias, out, P, rows, columns,
            out_stride, OFFSET, K, e, m, part, place, count, ids, 0)  # fmt: skip
    tiles(args, count, STAGE, ROUTE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE, X_BY_PAIR,
          EVEN, PB, BM, BN, LADDER, UNROLL, STAGES, SPLIT, TOGETHER, PDL, False, 0)  # fmt: skip


@triton.jit
def find(ids, table, stride, slot, P, OFFSET, L, ROUTE: tl.constexpr, BN: tl.constexpr):
    """(local expert of a slot, -1 if it has no work; its place among the pairs; how many pairs)."""
    if ROUTE == SORTED:
        at = table + tl.minimum(slot, stride - 1)  # loads that do not wait for each other
        works = slot < tl.load(table + 3 * stride, cache_modifier=".cg")
        e = tl.load(at, cache_modifier=".cg")
        start = tl.load(at + stride, cache_modifier=".cg")
        count = tl.load(at + 2 * stride, cache_modifier=".cg") - start
        return tl.where(works, e, -1), start, count
    else:
        e = tl.load(ids + slot, slot < P, other=-1, cache_modifier=".cg") - OFFSET
        e = tl.where((e < 0) | (e >= L), -1, e)
        return e, slot, e * 0 + BN


@triton.jit
def tiles(
    args, count, STAGE: tl.constexpr, ROUTE: tl.constexpr, COMBINE: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, EVEN: tl.constexpr,
    PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LADDER: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr,
    CHAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """_tile, as wide as `count` pairs need."""
    QUARTER: tl.constexpr = BN // 4
    if LADDER and count <= QUARTER:
        _tile(args, STAGE, ROUTE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE,
              X_BY_PAIR, EVEN,
              PB, BM, QUARTER, 0, UNROLL, STAGES, SPLIT, TOGETHER, PDL, CHAIN, AHEAD)  # fmt: skip
    elif LADDER and count <= 2 * QUARTER:
        _tile(args, STAGE, ROUTE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE,
              X_BY_PAIR, EVEN,
              PB, BM, 2 * QUARTER, 0, UNROLL, STAGES, SPLIT, TOGETHER, PDL, CHAIN, AHEAD)  # fmt: skip
    elif LADDER and count <= 3 * QUARTER:
        _tile(args, STAGE, ROUTE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE,
              X_BY_PAIR, EVEN,
              PB, BM, 2 * QUARTER, QUARTER, UNROLL, STAGES, SPLIT, TOGETHER, PDL, CHAIN, AHEAD)  # fmt: skip
    else:
        _tile(args, STAGE, ROUTE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE,
              X_BY_PAIR, EVEN,
              PB, BM, BN, 0, UNROLL, STAGES, SPLIT, TOGETHER, PDL, CHAIN, AHEAD)  # fmt: skip


@triton.jit
def _tile(
    args, STAGE: tl.constexpr, ROUTE: tl.constexpr, COMBINE: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, EVEN: tl.constexpr,
    PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr,
    PDL: tl.constexpr, CHAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BM rows of expert e for BN pairs, and BN2 more where BN2 is not 0 (B operands are powers of two
    wide). CHAIN: both products are one launch (see chain.py)."""
    (x, x_scale, ids, pair_weights, sorted_pairs, w, w_scales, row_scale, bias, out, P, rows, columns,
     out_stride, OFFSET, K, e, m, part, place, count, done, strips) = args  # fmt: skip
    HAS2: tl.constexpr = BN2 > 0
    WIDTH2: tl.constexpr = BN2 if HAS2 else BN
    first = tl.arange(0, BN)
    second = BN + tl.arange(0, WIDTH2)
    works = True
    if ROUTE == SORTED:
        pairs = tl.load(sorted_pairs + place + first, first < count, other=-1, cache_modifier=".cg")
        places = place + first
    elif ROUTE == SINGLE:
        pairs = tl.where(first == 0, place, -1)
        places = pairs
    else:
        works, pairs = _direct_pairs(ids, place, e, P, OFFSET, BN, PB)
        places = pairs
    if HAS2:
        pairs2 = tl.load(sorted_pairs + place + second, second < count, other=-1, cache_modifier=".cg")
    else:
        pairs2 = second
    if works:
        r = m * BM + tl.arange(0, BM)
        dense_r, real = _dense_rows(r, rows, GATED)
        # what the epilogue needs is asked for before the loop, which hides its way from memory
        if FORMAT == NVFP4:
            padded = tl.cdiv(rows // 2, 32) * 64 if GATED else tl.cdiv(rows, 64) * 64
            scale = tl.load(row_scale + e.to(tl.int64) * padded + r, real, other=0.0)
        else:
            scale = tl.full((BM,), 1.0, tl.float32)
        if BIAS:
            shift = tl.load(bias + e * rows + dense_r, real, other=0.0).to(tl.float32)
            shift = tl.where(part == 0, shift, 0.0)
        else:
            shift = tl.zeros((BM,), tl.float32)
        if STAGE == 2:
            if CHAIN:
                _wait_for_tiles(done, strips, w, w_scales, e.to(tl.int64), m, part, rows, columns, FORMAT, BM,
                                SPLIT, AHEAD)  # fmt: skip
            else:
                wait_for_previous(PDL)
        if not CHAIN:
            launch_next(PDL)
        x_rows = _x_rows(pairs, places, K, STAGE, X_BY_PAIR)
        x_rows2 = _x_rows(pairs2, place + second, K, STAGE, X_BY_PAIR)
        acc, acc2 = _product(x, x_rows, pairs >= 0, x_rows2, pairs2 >= 0, w, w_scales, e.to(tl.int64), m,
                             part, rows, columns, FORMAT, GATED, EVEN, BM, BN, BN2, UNROLL, STAGES, SPLIT,
                             TOGETHER)  # fmt: skip
        _finish(acc, scale, shift, x_scale, x_rows, pairs, places, pair_weights, out, m, r, part, real, rows,
                out_stride, K, STAGE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, X_SCALE,
                SPLIT, BM, BN)  # fmt: skip
        if HAS2:
            _finish(acc2, scale, shift, x_scale, x_rows2, pairs2, place + second, pair_weights, out, m, r,
                    part, real, rows, out_stride, K, STAGE, COMBINE, FORMAT, GATED, ACT, ALPHA, LIMIT,
                    SHIFT, BIAS, X_SCALE, SPLIT,
                    BM, BN2)  # fmt: skip
        if CHAIN and STAGE == 1:
            tl.debug_barrier()  # every thread's part of the tile is written before one thread says so
            tl.atomic_add(done, 1, sem="release")


@triton.jit
def _wait_for_tiles(done, strips, w, w_scales, e, m, part, rows, columns, FORMAT: tl.constexpr,
                    BM: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Until all strips of the first product of these pairs are done; the weights' first AHEAD bytes are asked
    into L2 meanwhile."""
    if FORMAT == NVFP4 and AHEAD > 0:
        blocks = tl.cdiv(columns, 64)
        each = blocks // SPLIT
        block = (e * tl.cdiv(rows, 64) + m * BM // 64) * blocks + part * each
        size = tl.minimum(each * 2048, AHEAD)
        wait_for_count(done, strips, w + block * 1024, size, w_scales + block * 64, size // 8)
    else:
        wait_for_count(done, strips, done, 0, done, 0)


@triton.jit
def _x_rows(pairs, places, K, STAGE: tl.constexpr, X_BY_PAIR: tl.constexpr):
    if STAGE == 2:
        rows = places
    elif X_BY_PAIR:
        rows = pairs
    else:
        rows = pairs // K
    return tl.where(pairs >= 0, rows, 0)


@triton.jit
def _finish(acc, scale, shift, x_scale, x_rows, pairs, places, pair_weights, out, m, r, part, real, rows,
            out_stride, K, STAGE: tl.constexpr, COMBINE: tl.constexpr, FORMAT: tl.constexpr,
            GATED: tl.constexpr, ACT: tl.constexpr,
            ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
            X_SCALE: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Scales, bias, then the activation (STAGE 1) or the routing weight (STAGE 2), and out."""
    there = pairs >= 0
    if FORMAT == NVFP4:
        acc *= scale[:, None]
    if X_SCALE:
        acc *= tl.load(x_scale + x_rows, there, other=0.0)[None, :]
    if BIAS:
        acc += shift[:, None]
    if STAGE == 1:
        _store_activated(
            acc, out, places, there, m, rows, out_stride, GATED, ACT, ALPHA, LIMIT, SHIFT, BM, BN
        )
    else:
        acc *= tl.load(pair_weights + pairs, there, other=0.0)[None, :]
        mask = real[:, None] & there[None, :]
        if COMBINE == ATOMIC:
            at = out + (pairs // K).to(tl.int64)[None, :] * out_stride + r[:, None]
            tl.atomic_add(at, acc, mask=mask, sem="relaxed")
        else:
            at = out + (pairs * SPLIT + part).to(tl.int64)[None, :] * out_stride + r[:, None]
            tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, x_rows, there, x_rows2, there2, w, w_scales, e, m, part, rows, columns, FORMAT: tl.constexpr,
             GATED: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BN2: tl.constexpr,
             UNROLL: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
             TOGETHER: tl.constexpr):  # fmt: skip
    """float32 [BM, BN] and [BM, BN2]: kernel rows m * BM ... of expert e, times rows of x.

    Of the blocks of 64 columns, it does `part` of SPLIT equal ones; UNROLL divides those.
    """
    HAS2: tl.constexpr = BN2 > 0
    k = tl.arange(0, 64)
    r = m * BM + tl.arange(0, BM)
    blocks = tl.cdiv(columns, 64)
    xp = x + x_rows.to(tl.int64)[None, :] * columns + k[:, None]
    xp2 = x + x_rows2.to(tl.int64)[None, :] * columns + k[:, None]
    if FORMAT == NVFP4:
        row_blocks = tl.cdiv(rows // 2, 32) if GATED else tl.cdiv(rows, 64)
        strip = tl.minimum(r // 64, row_blocks - 1) * blocks  # the last strip again where BM overhangs
        word = tl.arange(0, 16)
        wp = (
            w
            + e * (row_blocks * blocks) * 1024
            + strip[:, None] * 1024
            + (r % 64)[:, None] * 16
            + word[None, :]
        )
        sp = w_scales + e * (row_blocks * blocks) * 64 + strip * 64 + r % 64
    else:
        dense_r, real = _dense_rows(r, rows, GATED)
        wp = w + e * rows * columns + tl.where(real, dense_r, 0).to(tl.int64)[:, None] * columns + k[None, :]
        sp = wp
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN2 if HAS2 else 16), tl.float32)
    first = 0
    last = blocks
    if SPLIT > 1:
        first = part * (blocks // SPLIT)
        last = first + blocks // SPLIT
        xp += first * 64
        xp2 += first * 64
        wp += first * (1024 if FORMAT == NVFP4 else 64)
        sp += first * 64
    for b in tl.range(first, last, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            left = columns - (b + u) * 64
            x_mask = there[None, :]
            x_mask2 = there2[None, :]
            if not EVEN:
                x_mask = x_mask & (k[:, None] < left)
                x_mask2 = x_mask2 & (k[:, None] < left)
            if FORMAT == NVFP4:
                a = decode_block(tl.load(wp + u * 1024), tl.load(sp + u * 64))
            elif EVEN:
                a = tl.load(wp + u * 64)
            else:
                a = tl.load(wp + u * 64, k[None, :] < left, other=0.0)
            acc = dot(a, tl.load(xp + u * 64, x_mask, other=0.0), acc)
            if HAS2:
                acc2 = dot(a, tl.load(xp2 + u * 64, x_mask2, other=0.0), acc2)
        if FORMAT == NVFP4:
            if TOGETHER:
                acc = settle(acc)
                if HAS2:
                    acc2 = settle(acc2)
            wp += UNROLL * 1024
            sp += UNROLL * 64
        else:
            wp += UNROLL * 64
        xp += UNROLL * 64
        xp2 += UNROLL * 64
    return acc, acc2


@triton.jit
def _store_activated(acc, out, places, there, m, rows, out_stride, GATED: tl.constexpr, ACT: tl.constexpr,
                     ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    """Activate float32 [BM, BN] and write it to out[place]. Gate and up rows meet in one thread."""
    if GATED:
        HALF: tl.constexpr = BM // 2
        gate, up = acc.reshape(BM // 16, 2, 8, BN).permute(0, 2, 3, 1).split()
        a = activate(gate, up, ACT, ALPHA, LIMIT, SHIFT).reshape(HALF, BN)
        j = m * HALF + tl.arange(0, HALF)
        real = j < rows // 2
    else:
        a = activate(acc, acc, ACT, ALPHA, LIMIT, SHIFT)
        j = m * BM + tl.arange(0, BM)
        real = j < rows
    at = out + places.to(tl.int64)[None, :] * out_stride + j[:, None]
    tl.store(at, a.to(out.dtype.element_ty), real[:, None] & there[None, :])

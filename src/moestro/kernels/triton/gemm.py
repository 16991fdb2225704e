"""One grouped matrix product for every weight format: out[pair] = f(W[expert of pair] @ rows[pair]).

Swap-AB: BM rows of weights are the A operand, BN pairs of one expert the B operand, so that few tokens still use
the tensor cores, and quantised weights are decoded in the registers that feed them. BM >= 64 with four warps or
more gives wgmma with A in registers, less gives mma.sync, which needs no waiting between products.

STAGE 1 gathers x, and its epilogue is bias and activation; STAGE 2 reads the intermediate, and its epilogue is
bias and routing weight. A program finds its pairs in the tables of `sort.py`, or (ROUTE = DIRECT, few pairs) by
itself: slot s belongs to pair s, and works if s is the first of BN pairs of its expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device import NVFP4, RELU2, activate, decode_block, dot, launch_next, wait_for_previous

DIRECT, SORTED = tl.constexpr(0), tl.constexpr(1)
PARTIAL, ATOMIC = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _direct_tile(ids, slot, P, OFFSET: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, PB: tl.constexpr):
    """(expert, or -1 if another slot does this work; the BN pairs, -1 where there is none)."""
    p = tl.arange(0, PB)
    all_ids = tl.load(ids + p, p < P, other=-1) - OFFSET
    e = tl.load(ids + slot) - OFFSET
    same = (all_ids == e) & (p < P)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    mine = tl.sum((same & (p < slot)).to(tl.int32), 0)
    wanted = mine + tl.arange(0, BN)
    hit = same[:, None] & (rank[:, None] == wanted[None, :])
    pairs = tl.sum(tl.where(hit, p[:, None] + 1, 0), 0) - 1
    works = (e >= 0) & (e < L) & (mine % BN == 0)
    return tl.where(works, e, -1), pairs


@triton.jit
def _sorted_tile(sorted_pairs, tile_expert, tile_start, tile_end, num_tiles, slot, BN: tl.constexpr):
    """(expert, or -1 beyond the last tile; the BN places in the sorted order; their pairs, -1: none)."""
    works = slot < tl.load(num_tiles)
    e = tl.load(tile_expert + slot, works, other=-1)
    at = tl.load(tile_start + slot, works, other=0) + tl.arange(0, BN)
    there = at < tl.load(tile_end + slot, works, other=0)
    return e, at, tl.load(sorted_pairs + at, there, other=-1)


@triton.jit
def _dense_rows(r, rows, GATED: tl.constexpr):
    """Row of the checkpoint's matrix at kernel row r (8 of gate, 8 of up, alternating); may exceed `rows`."""
    if GATED:
        half = rows // 2
        j = (r // 16) * 8 + r % 8
        return tl.where(r % 16 < 8, j, half + j), j < half
    else:
        return r, r < rows


@triton.jit
def moe_gemm(
    x, x_scale, ids, pair_weights, sorted_pairs, tile_expert, tile_start, tile_end, num_tiles,
    w, w_scales, row_scale, bias, out, zeros,
    P, slots, rows, columns, out_stride, num_zeros,
    STAGE: tl.constexpr, ROUTE: tl.constexpr, COMBINE: tl.constexpr, FORMAT: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BIAS: tl.constexpr, X_SCALE: tl.constexpr, X_BY_PAIR: tl.constexpr, EVEN: tl.constexpr,
    OFFSET: tl.constexpr, L: tl.constexpr, K: tl.constexpr, PB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module. Kernel rows are in `layout.row_order`; `rows`, `columns` are the checkpoint's.

    x rows of `columns` values: by token (STAGE 1), by pair or place (STAGE 2, as STAGE 1 wrote them).
    x_scale float32: of each row of x, if X_SCALE. out: STAGE 1 [P, out_stride] in its dtype; STAGE 2 PARTIAL
    [P, out_stride] by pair, ATOMIC float32 [N, out_stride]. zeros: float32 [num_zeros] to clear for an ATOMIC
    STAGE 2.
    """
    pid = tl.program_id(0)
    slot = pid % slots
    m = pid // slots
    launch_next(PDL)
    wait_for_previous(PDL)
    if STAGE == 1 and COMBINE == ATOMIC:
        span = tl.num_programs(0) * 1024
        for first in range(pid * 1024, num_zeros, span):
            i = first + tl.arange(0, 1024)
            tl.store(zeros + i, tl.zeros((1024,), tl.float32), i < num_zeros)
    if ROUTE == DIRECT:
        e, pairs = _direct_tile(ids, slot, P, OFFSET, L, BN, PB)
        places = pairs
    else:
        e, places, pairs = _sorted_tile(sorted_pairs, tile_expert, tile_start, tile_end, num_tiles, slot, BN)
    if e < 0:
        return
    there = pairs >= 0
    if STAGE == 1 and not X_BY_PAIR:
        x_rows = tl.where(there, pairs // K, 0)
    elif STAGE == 1:
        x_rows = tl.where(there, pairs, 0)
    else:
        x_rows = tl.where(there, places, 0)
    acc = _product(x, x_rows, there, w, w_scales, e.to(tl.int64), m, rows, columns, FORMAT, GATED, EVEN, BM, BN,
                   UNROLL, STAGES)  # fmt: skip
    r = m * BM + tl.arange(0, BM)
    dense_r, real = _dense_rows(r, rows, GATED)
    if FORMAT == NVFP4:
        padded = (tl.cdiv(rows // (2 if GATED else 1), 64 // (2 if GATED else 1))) * 64
        acc *= tl.load(row_scale + e.to(tl.int64) * padded + r, real, other=0.0)[:, None]
    if X_SCALE:
        acc *= tl.load(x_scale + x_rows, there, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + e * rows + dense_r, real, other=0.0).to(tl.float32)[:, None]
    if STAGE == 1:
        _store_activated(acc, out, places, there, m, rows, out_stride, GATED, ACT, ALPHA, LIMIT, SHIFT, BM, BN)
    else:
        acc *= tl.load(pair_weights + pairs, there, other=0.0)[None, :]
        mask = real[:, None] & there[None, :]
        if COMBINE == ATOMIC:
            at = out + (pairs // K).to(tl.int64)[None, :] * out_stride + r[:, None]
            tl.atomic_add(at, acc, mask=mask, sem="relaxed")
        else:
            at = out + pairs.to(tl.int64)[None, :] * out_stride + r[:, None]
            tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, x_rows, there, w, w_scales, e, m, rows, columns, FORMAT: tl.constexpr, GATED: tl.constexpr,
             EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """float32 [BM, BN]: kernel rows m * BM ... of expert e, times the rows x_rows of x. UNROLL divides the blocks."""
    k = tl.arange(0, 64)
    r = m * BM + tl.arange(0, BM)
    blocks = tl.cdiv(columns, 64)
    xp = x + x_rows.to(tl.int64)[None, :] * columns + k[:, None]
    if FORMAT == NVFP4:
        row_blocks = tl.cdiv(rows // 2, 32) if GATED else tl.cdiv(rows, 64)
        strip = tl.minimum(r // 64, row_blocks - 1) * blocks  # the last strip again where BM overhangs
        word = tl.arange(0, 16)
        wp = w + e * (row_blocks * blocks) * 1024 + strip[:, None] * 1024 + (r % 64)[:, None] * 16 + word[None, :]
        sp = w_scales + e * (row_blocks * blocks) * 64 + strip * 64 + r % 64
    else:
        dense_r, real = _dense_rows(r, rows, GATED)
        wp = w + e * rows * columns + tl.where(real, dense_r, 0).to(tl.int64)[:, None] * columns + k[None, :]
        sp = wp
    acc = tl.zeros((BM, BN), tl.float32)
    for b in tl.range(0, blocks, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            if EVEN:
                x_mask = there[None, :]
            else:
                x_mask = there[None, :] & (k[:, None] < columns - (b + u) * 64)
            if FORMAT == NVFP4:
                words = tl.load(wp + u * 1024)
                scale = tl.load(sp + u * 64)
                xb = tl.load(xp + u * 64, x_mask, other=0.0)
                acc = dot(decode_block(words, scale), xb, acc)
            else:
                if EVEN:
                    wb = tl.load(wp + u * 64)
                else:
                    wb = tl.load(wp + u * 64, k[None, :] < columns - (b + u) * 64, other=0.0)
                xb = tl.load(xp + u * 64, x_mask, other=0.0)
                acc = dot(wb, xb, acc)
        xp += UNROLL * 64
        if FORMAT == NVFP4:
            wp += UNROLL * 1024
            sp += UNROLL * 64
        else:
            wp += UNROLL * 64
    return acc


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

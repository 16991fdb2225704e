"""Triton kernels that write to and read from other GPUs' memory.

`buffers` is a device array with the address of the same symmetric buffer on every rank; row n of rank s has
slot s * B + n in all of them. `push_rows` writes a token's row to each rank that needs it, once, with the pairs
that are that rank's; of slots that nobody needs only the pairs are written, all -1. `pull_sums` reads the
results of a token from each rank that computed some and adds them in float32, in order of rank.

One program moves BLOCK columns of one row, so that the few rows of decoding have programs enough as well: a
program waits for one load and one store, whatever the row is long.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pull_sums", "push_rows", "unpack_rows"]


@triton.jit
def _needs(ids, n, peer, table, local, E, turns, turn, K: tl.constexpr, K2: tl.constexpr):
    """(ids of row n as rank `peer` takes them [K2], whether it needs the row)."""
    k = tl.arange(0, K2)
    expert = tl.load(ids + n * K + k, mask=k < K, other=-1)
    known = tl.where((expert >= 0) & (expert < E), expert, E)
    rank = tl.load(table + known * turns + turn)
    theirs = (rank == peer) & (known < E)
    own = tl.where(theirs, tl.load(local + peer * (E + 1) + known), -1)
    return own, tl.max(theirs.to(tl.int32), axis=0)


@triton.jit
def push_rows(
    x, ids, weights, table, local, row_buffers, id_buffers, weight_buffers, rank, N, B, E, turns,
    H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Grid (B, R, ceil(H / BLOCK)): row n to rank `peer`. x [N, H], ids int32 [N, K], weights float32 [N, K].

    FP8: rows as e4m3 with a scale each, which follows the row's weights; BLOCK then holds a whole row.
    """
    n, peer, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k = tl.arange(0, K2)
    slot = rank * B + n
    to_ids = tl.load(id_buffers + peer).to(tl.pointer_type(tl.int32)) + slot * K + k
    if n >= N:
        if block == 0:
            tl.store(to_ids, tl.full((K2,), -1, tl.int32), mask=k < K)
    else:
        own, needed = _needs(ids, n, peer, table, local, E, turns, (n + rank) % turns, K, K2)
        to_weights = tl.load(weight_buffers + peer).to(tl.pointer_type(tl.float32)) + slot * (K + FP8)
        if block == 0:
            tl.store(to_ids, own, mask=k < K)
            tl.store(to_weights + k, tl.load(weights + n * K + k, mask=k < K), mask=k < K)
        if needed > 0:
            column = block * BLOCK + tl.arange(0, BLOCK)
            inside = column < H
            row = tl.load(x + n.to(tl.int64) * H + column, mask=inside, other=0)
            at = slot.to(tl.int64) * H + column
            if FP8:
                wide = row.to(tl.float32)
                scale = tl.maximum(tl.max(tl.abs(wide), axis=0), 1e-12) / 448.0
                codes = tl.load(row_buffers + peer).to(tl.pointer_type(tl.float8e4nv))
                tl.store(codes + at, (wide / scale).to(tl.float8e4nv), mask=inside)
                tl.store(to_weights + K, scale)
            else:
                tl.store(
                    tl.load(row_buffers + peer).to(tl.pointer_type(x.dtype.element_ty)) + at, row, mask=inside
                )


@triton.jit
def unpack_rows(
    codes, ids, weights, rows, own_weights,
    H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (M, ceil(H / BLOCK)): rows [M, H] of e4m3 codes, weights [M, K] out of [M, K + 1]; what nobody needs
    is left as it is."""
    n, block = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, K2)
    if tl.max(tl.load(ids + n * K + k, mask=k < K, other=-1), axis=0) >= 0:
        if block == 0:
            tl.store(own_weights + n * K + k, tl.load(weights + n * (K + 1) + k, mask=k < K), mask=k < K)
        column = block * BLOCK + tl.arange(0, BLOCK)
        at = n.to(tl.int64) * H + column
        value = tl.load(codes + at, mask=column < H).to(tl.float32) * tl.load(weights + n * (K + 1) + K)
        tl.store(rows + at, value.to(rows.dtype.element_ty), mask=column < H)


@triton.jit
def pull_sums(
    out, ids, table, local, result_buffers, rank, B, E, turns,
    R: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, ceil(H / BLOCK)): out[n] = the sum over ranks that computed pairs of row n."""
    n = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    at = (rank * B + n).to(tl.int64) * H + column
    for peer in range(R):
        _, needed = _needs(ids, n, peer, table, local, E, turns, (n + rank) % turns, K, K2)
        if needed > 0:
            theirs = tl.load(result_buffers + peer).to(tl.pointer_type(out.dtype.element_ty))
            total += tl.load(theirs + at, mask=inside).to(tl.float32)
    tl.store(out + n.to(tl.int64) * H + column, total.to(out.dtype.element_ty), mask=inside)

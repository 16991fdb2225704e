"""What DeepGEMM leaves to its caller, as Triton functions: pairs in rows, quantised to e4m3 per 128 columns, and back.

Rows are those of glue.Aligner's table with tiles of 128: an expert's pairs, then padding up to whole tiles; what is in
padded rows is nobody's. Scales are [rows, columns / 128] float32, stored column by column, as DeepGEMM's loads want.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moestro.bench.adapters.glue import Aligned

__all__ = ["GROUP", "ends_of", "quantise_pairs", "scales_for", "silu_and_quantise", "weighted_sum_of"]

GROUP = 128  # columns that share a scale; rows of a tile, too
MOST = tl.constexpr(448.0)


@triton.jit(do_not_specialize=["P"])
def _ends(pairs, experts, length, ends, P, L: tl.constexpr, HEIGHT: tl.constexpr):
    """ends [L]: where each expert's pairs end; an expert without pairs ends where the padding before it does."""
    tile = tl.program_id(0)
    tiles = tl.load(length) // HEIGHT
    if tile < tiles:
        expert = tl.load(experts + tile)
        after = tl.load(experts + tile + 1, tile + 1 < tiles, other=L)
        if after != expert:
            pair = tl.load(pairs + tile * HEIGHT + tl.arange(0, HEIGHT))
            tl.store(ends + expert, tile * HEIGHT + tl.sum((pair != P).to(tl.int32), 0))
            for empty in range(expert + 1, after):
                tl.store(ends + empty, (tile + 1) * HEIGHT)
        if tile == 0:
            for empty in range(0, expert):
                tl.store(ends + empty, 0)


@triton.jit
def _quantised(values):
    """[GROUP] float32 -> (e4m3 codes, the scale): amax / 448, or 1 of zeros."""
    amax = tl.max(tl.abs(values), 0)
    scale = tl.where(amax == 0, 1.0, amax / MOST)
    return (values / scale).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["P", "columns", "rows"])
def _quantise_pairs(
    x, pairs, length, codes, scales, places, P, columns, rows, K: tl.constexpr, GROUP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if row < tl.load(length):
        pair = tl.load(pairs + row)
        if pair < P:
            column = group * GROUP + tl.arange(0, GROUP)
            values = tl.load(x + (pair // K).to(tl.int64) * columns + column).to(tl.float32)
            made, scale = _quantised(values)
            tl.store(codes + row * columns + column, made)
            tl.store(scales + group * rows + row, scale)
            if group == 0:
                tl.store(places + pair, row.to(tl.int32))


@triton.jit(do_not_specialize=["P", "columns", "rows"])
def _silu_and_quantise(hidden, pairs, length, codes, scales, P, columns, rows, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if row < tl.load(length) and tl.load(pairs + row) < P:
        column = group * GROUP + tl.arange(0, GROUP)
        gate = tl.load(hidden + row * 2 * columns + column).to(tl.float32)
        up = tl.load(hidden + (row * 2 + 1) * columns + column).to(tl.float32)
        made, scale = _quantised(gate / (1 + tl.exp(-gate)) * up)
        tl.store(codes + row * columns + column, made)
        tl.store(scales + group * rows + row, scale)


@triton.jit(do_not_specialize=["columns"])
def _weighted_sum_of(
    y, places, weights, ids, out, columns, L: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        expert = tl.load(ids + token * K + k)
        if (expert >= 0) & (expert < L):
            place = tl.load(places + token * K + k).to(tl.int64)
            part = tl.load(y + place * columns + column, column < columns, other=0)
            total += tl.load(weights + token * K + k) * part.to(tl.float32)
    tl.store(out + token * columns + column, total.to(tl.bfloat16), column < columns)


def scales_for(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Room for scales [rows, columns / 128], column by column."""
    return torch.empty(columns // GROUP, rows, device=device).T


def ends_of(table: Aligned, num_pairs: int, ends: torch.Tensor) -> None:
    """ends [L] int32 of a table with at least one pair."""
    tiles = len(table.experts)
    _ends[(tiles,)](
        table.pairs, table.experts, table.length, ends, num_pairs, L=len(ends), HEIGHT=table.height
    )


def quantise_pairs(
    x: torch.Tensor,
    table: Aligned,
    top_k: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """codes [rows, H] e4m3 and scales of each pair's row of x [N, H] bf16; places [P] int32: the row of a pair."""
    rows, columns = codes.shape
    grid = (rows, columns // GROUP)
    _quantise_pairs[grid](x, table.pairs, table.length, codes, scales, places, len(places), columns, rows, K=top_k,
                          GROUP=GROUP)  # fmt: skip


def silu_and_quantise(
    hidden: torch.Tensor, table: Aligned, num_pairs: int, codes: torch.Tensor, scales: torch.Tensor
) -> None:
    """codes [rows, I] e4m3 and scales of silu(gate) · up, of hidden [rows, 2I] bf16 with the gates first."""
    rows, columns = codes.shape
    grid = (rows, columns // GROUP)
    _silu_and_quantise[grid](
        hidden, table.pairs, table.length, codes, scales, num_pairs, columns, rows, GROUP=GROUP
    )


def weighted_sum_of(
    y: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    num_local: int,
) -> None:
    """out [N, H] = Σ_k weights[n, k] · y[places[n·K + k]] over the local experts' pairs, of y [rows, H] bf16."""
    tokens, columns = out.shape
    block = min(1024, triton.next_power_of_2(columns))
    grid = (tokens, triton.cdiv(columns, block))
    _weighted_sum_of[grid](y, places, weights, ids, out, columns, L=num_local, K=ids.shape[1], BLOCK=block)

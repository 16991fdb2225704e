"""What a grouped GEMM package leaves to its caller, as Triton kernels: align, activate, sum.

`align` is what vLLM calls moe_align_block_size: pairs by expert, each expert's share padded to whole tiles
with the number P of pairs, and the expert of each tile. One launch for up to CHUNK pairs, two beyond. Two tile
heights are laid out at once, for packages whose products are tiled differently. Pairs whose expert is not
local get no tile, and contribute nothing to the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["Aligned", "Aligner", "silu_and_mul", "weighted_sum"]

CHUNK = 2048  # pairs of one program


@triton.jit
def _expert_of(ids, pair, P, L: tl.constexpr):
    expert = tl.load(ids + pair, pair < P, other=-1)
    return tl.where((expert >= 0) & (expert < L), expert, L)


@triton.jit(do_not_specialize=["P"])
def _count(ids, counts, P, L: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts [chunks, BINS]: pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    expert = _expert_of(ids, chunk * CHUNK + tl.arange(0, CHUNK), P, L)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit
def _lay_out(pairs, experts, length, starts, totals, bins, padding, L: tl.constexpr, M: tl.constexpr):
    """Fill the ends of experts' last tiles with `padding`; name the expert of each tile; the padded length."""
    tiles = tl.where(bins < L, (totals + M - 1) // M, 0)
    tl.store(length, tl.sum(tiles, 0) * M)
    missing = tiles * M - totals
    for i in range(tl.max(tl.where(bins < L, missing, 0), 0)):
        tl.store(pairs + starts + totals + i, tl.zeros_like(bins) + padding, (bins < L) & (i < missing))
    for i in range(tl.max(tiles, 0)):
        tl.store(experts + starts // M + i, bins, i < tiles)


@triton.jit(do_not_specialize=["P", "num_chunks"])
def _align(ids, counts, cursors, pairs1, experts1, length1, pairs2, experts2, length2, P, num_chunks,
           L: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, M1: tl.constexpr,
           M2: tl.constexpr):  # fmt: skip
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _expert_of(ids, pair, P, L)
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)
    totals = tl.zeros((BINS,), tl.int32)
    if num_chunks == 1:
        totals += tl.histogram(expert, BINS)
    else:
        rows = tl.arange(0, 16)
        for first in range(0, num_chunks, 16):
            row = first + rows
            part = tl.load(counts + row[:, None] * BINS + bins[None, :], (row < num_chunks)[:, None], other=0)
            totals += tl.sum(part, 0)
            before += tl.sum(tl.where((row < chunk)[:, None], part, 0), 0)
    padded1 = (totals + M1 - 1) // M1 * M1
    padded2 = (totals + M2 - 1) // M2 * M2
    starts1 = tl.cumsum(padded1, 0) - padded1
    starts2 = tl.cumsum(padded2, 0) - padded2
    mine = cursors + chunk * 3 * BINS  # what the pairs below look up by expert
    tl.store(mine + bins, before)
    tl.store(mine + BINS + bins, starts1)
    tl.store(mine + 2 * BINS + bins, starts2)
    tl.debug_barrier()
    local = (pair < P) & (expert < L)
    place = tl.atomic_add(mine + expert, 1, mask=local, sem="relaxed")
    tl.store(pairs1 + tl.load(mine + BINS + expert, local, other=0) + place, pair, local)
    if M2 != M1:
        tl.store(pairs2 + tl.load(mine + 2 * BINS + expert, local, other=0) + place, pair, local)
    if chunk == 0:
        _lay_out(pairs1, experts1, length1, starts1, totals, bins, P, L, M1)
        if M2 != M1:
            _lay_out(pairs2, experts2, length2, starts2, totals, bins, P, L, M2)


@triton.jit(do_not_specialize=["columns"])
def _silu_and_mul(gate_up, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_up + row * 2 * columns + column, inside).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * columns + column, inside).to(tl.float32)
    tl.store(out + row * columns + column, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), inside)


@triton.jit(do_not_specialize=["columns"])
def _weighted_sum(y, weights, ids, out, columns, L: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        expert = tl.load(ids + row * K + k)
        width = tl.where((expert >= 0) & (expert < L), columns, 0)
        part = tl.load(y + (row * K + k) * columns + column, column < width, other=0)
        total += tl.load(weights + row * K + k) * part.to(tl.float32)
    tl.store(out + row * columns + column, total.to(tl.bfloat16), column < columns)


@dataclass(frozen=True)
class Aligned:
    """Pairs by expert in whole tiles of `height` rows. `pairs` holds P where a tile is not full."""

    height: int
    pairs: torch.Tensor  # int32 [capacity]
    experts: torch.Tensor  # int32 [capacity / height], the expert of each tile
    length: torch.Tensor  # int32 [1], how much of `pairs` is in use


class Aligner:
    """Buffers for aligning `num_pairs` pairs of `num_local_experts` experts to two tile heights."""

    def __init__(
        self, num_pairs: int, num_local_experts: int, heights: tuple[int, int], device: torch.device | str
    ):
        self.num_pairs, self.num_local_experts = num_pairs, num_local_experts
        self.chunks = triton.cdiv(num_pairs, CHUNK)
        self.bins = triton.next_power_of_2(num_local_experts + 1)
        make = {"dtype": torch.int32, "device": device}
        self._counts = torch.empty(self.chunks, self.bins, **make)  # type: ignore[call-overload]
        self._cursors = torch.empty(self.chunks, 3, self.bins, **make)  # type: ignore[call-overload]

        def table(height: int) -> Aligned:
            tiles = min(num_pairs, num_local_experts + num_pairs // height)
            return Aligned(height, *(torch.empty(n, **make) for n in (tiles * height, tiles, 1)))  # type: ignore[call-overload]

        self.first = table(heights[0])
        self.second = self.first if heights[1] == heights[0] else table(heights[1])

    def __call__(self, ids: torch.Tensor) -> None:
        """Align ids [N, K] int32 into `first` and `second`."""
        size = min(CHUNK, max(32, triton.next_power_of_2(self.num_pairs)))
        meta = {
            "L": self.num_local_experts,
            "BINS": self.bins,
            "CHUNK": size,
            "num_warps": 8 if size > 512 else 4,
        }
        if self.chunks > 1:
            _count[(self.chunks,)](ids, self._counts, self.num_pairs, **meta)
        one, two = self.first, self.second
        _align[(self.chunks,)](
            ids, self._counts, self._cursors, one.pairs, one.experts, one.length, two.pairs, two.experts,
            two.length, self.num_pairs, self.chunks, M1=one.height, M2=two.height, **meta,
        )  # fmt: skip


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [P, I] = silu(gate) · up, of gate_up [P, 2I] bf16 with the gates first."""
    rows, columns = out.shape
    block = min(1024, triton.next_power_of_2(columns))
    _silu_and_mul[(rows, triton.cdiv(columns, block))](gate_up, out, columns, BLOCK=block)


def weighted_sum(
    y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, num_local_experts: int
) -> None:
    """out [N, H] = Σ_k weights[n, k] · y[n·K + k] over the local experts' pairs, of y [N·K, H] bf16."""
    rows, columns = out.shape
    block = min(1024, triton.next_power_of_2(columns))
    grid = (rows, triton.cdiv(columns, block))
    _weighted_sum[grid](y, weights, ids, out, columns, L=num_local_experts, K=ids.shape[1], BLOCK=block)

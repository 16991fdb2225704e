"""Dense weights on Hopper for many pairs of an expert: a producer and consumers in one program (device/dense.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import has_wgmma
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.fused import with_stages_that_fit
from moestro.kernels.triton.paths.registers import most_registers, narrow_code, programs
from moestro.kernels.triton.paths.warp_specialized import BESIDE, SUMS
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, gated

NAME = "dense"
# Of each thread of (a consumer, the producer), by the warps that multiply and the product: with less the first one's
# producer, which keeps the addresses of what it gathers, or the second one's consumers spill in Triton 3.6.
REGISTERS = {(4, 1): (200, 56), (4, 2): (200, 56), (8, 1): (200, 104), (8, 2): (208, 88)}
PIECE = 64  # pairs that are copied at once, at most
EMPTY = 8  # times the pairs of an expert that a tile may be wide, to be raced


def tactic(pairs: int, tile: Tile, narrow: str = "halves") -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile, narrow)


FEW = tactic(64, Tile(128, 4, 8, 8), "quarters")
FULL = tactic(128, Tile(256, 4, 8, 4), "quarters")
# what was fastest somewhere on an H200, or within 3 % of it (docs/kernels.md), and what such tiles have between
TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "dense": (
        FEW,
        tactic(96, Tile(128, 4, 8, 7)),
        tactic(96, Tile(256, 4, 8, 4)),
        FULL,
        replace(FULL, raster_group=path.LONG_WALK),
        replace(FULL, narrow=""),
        tactic(144, Tile(256, 4, 8, 4)),
        tactic(192, Tile(128, 4, 8, 5)),
        tactic(288, Tile(128, 4, 8, 4)),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with as many stages as fit."""
    return with_stages_that_fit(tactic, lambda tactic, stage: _exceeds(problem, tactic, stage))


def _exceeds(problem: MoeProblem, tactic: Tactic, stage: int) -> bool:
    """Whether the programs that share a processor need more shared memory than it has."""
    return shared_bytes(problem, tactic, stage) * programs(tactic.tiles[stage - 1].warps) > SHARED_BYTES


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if not has_wgmma():
        return "the dense path needs the tensor cores of compute capability 9.0, and no interpreter"
    if problem.weight_format != "bf16" or problem.input_format is not None:
        return "the dense path takes weights and activations as they are"
    if tactic.route != "sorted" or tactic.split_k != 1:
        return "the dense path takes sorted pairs, and whole columns"
    for stage in (1, 2):
        tile, width = tactic.of_stage(stage)
        per_group = 16 * tile.warps
        if (
            tile.warps not in (4, 8)
            or tile.rows not in (per_group, 2 * per_group)
            or tile.k_blocks not in (1, 2, 4)
        ):
            return "a tile has 64 or 128 rows for each 4 of 4 or 8 warps, and 1, 2 or 4 stages a turn"
        most, extra = path.parts(width)
        if most not in (64, 128, 256) or extra not in (0, 16, 32, 64):
            return "a tile has 64, 128 or 256 pairs, or 16, 32 or 64 more"
        if tile.rows * width > SUMS[tile.warps] * 32 * tile.warps or (extra and tactic.narrow == "quarters"):
            return "a tile has no more sums than registers, and by quarters only a power of two"
        if _exceeds(problem, tactic, stage):
            return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, width = tactic.of_stage(stage)
    return ((width + tile.rows) * 128 + 16) * tile.stages + BESIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds, of bytes and of products; twice that for tiles that an expert leaves nearly empty, which are
    not raced: their kernels take seconds to compile, and narrower ones do the same.
    """
    products = path.estimates(problem, tactic, num_tokens)
    seconds = path.launches(tactic) + sum(max(e.memory, e.products / 1.1, e.operands) for e in products)
    empty = 2.0 if min(tactic.widths) > EMPTY * num_tokens * problem.top_k / problem.num_experts else 1.0
    return seconds * empty * path.walk(problem, tactic, num_tokens)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    return calls.scratch(problem, num_tokens, tactic, x_rows, half=True)


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it: a routing weight would need registers here
    call.by_size = True
    call.two_products(_product)


def _product(call: Call, stage: int, rows: Rows, out: torch.Tensor) -> None:
    from moestro.kernels.triton.device import dense as kernels

    tile, pairs = call.tactic.of_stage(stage)
    groups, each = tile.warps // 4, programs(tile.warps)
    consumer, producer = REGISTERS[tile.warps, stage]
    width, extra = path.parts(pairs)
    parts = extra // 2 if width < 128 and extra > 16 else extra  # what is copied at least: dense._produce
    piece = min(parts or PIECE, width // 2, PIECE)
    narrow = narrow_code(kernels, call.tactic.narrow)
    grid = kernels.Grid(tile.rows, width, extra, piece, groups, tile.k_blocks, tile.stages, call.tactic.raster_group,
                        narrow, consumer, producer)  # fmt: skip
    w_desc = _weights(call, stage, tile.rows)
    x_desc = w_desc if stage == 1 else _described(rows.data, [piece, 64])  # the first product gathers
    routing, stride = call.routing(stage)
    call.add(
        kernels.dense_wide_gemm, (call.processors * each,), rows.data, x_desc, w_desc, routing, stride,
        call.weights_of(stage), out, call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1, each),
    )  # fmt: skip


def _weights(call: Call, stage: int, rows: int) -> TensorDescriptor:
    """Blocks of `rows` rows and 64 columns. With a gate, 8 rows of gate and 8 of up take turns in a block.

    Gate's 8 rows of expert e are number e * 2I/8 + i of all; up's lie I rows behind. No more numbers than the last
    expert's gate has: a block beyond must not reach behind the tensor.
    """
    weights: torch.Tensor = call.weights_of(stage).data
    experts, all_rows, columns = weights.shape
    if not gated(call.p, stage):
        return _described(weights.view(-1, columns), [rows, 64])
    half = all_rows // 2
    shape = ((2 * experts - 1) * half // 8, 2, 8, columns)
    turns = weights.view(-1, columns).as_strided(shape, (8 * columns, half * columns, columns, 1))
    return _described(turns, [rows // 16, 2, 8, 64])


def _described(rows: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(rows, block, gl.NVMMASharedLayout(128, 16, len(block)))

"""Weights decoded while the tensor cores run: a producer and consumers in one program (device/warp_specialized.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import has_wgmma
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.fused import with_stages_that_fit
from moestro.kernels.triton.paths.registers import most_registers, narrow_code, programs
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, sizes

NAME = "warp_specialized"
# registers of a thread for sums, at most, by the warps that multiply: more, and ptxas serialises (C7512)
SUMS = {4: 128, 8: 144}
BESIDE = 10_240  # shared bytes beside the ring: barriers, and what turns results
LONG = 4096  # columns of a part of the second product: shorter ones cost more than a fuller last round gives


def tactic(pairs: int, tile: Tile, narrow: str = "quarters", split_k: int = 1) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile, narrow, split_k=split_k)


_128, _256 = tactic(128, Tile(256, 4, 8, 7)), tactic(256, Tile(128, 4, 8, 5), "")
TABLE: Mapping[str, tuple[Tactic, ...]] = {  # see fused.TABLE
    "packed": (
        tactic(96, Tile(256, 4, 8, 9), "halves"),
        _128,
        tactic(144, Tile(256, 4, 8, 7), "halves"),
        tactic(192, Tile(128, 4, 8, 7), "halves"),
        tactic(288, Tile(128, 4, 8, 5), "halves"),
        tactic(256, Tile(128, 4, 8, 5), "halves"),
        _256,
        # not measured here: dense weights take 4 % less so at 1024 pairs per expert
        replace(_128, raster_group=path.LONG_WALK),
        replace(_256, raster_group=path.LONG_WALK),
        replace(_128, split_k=2),
        tactic(144, Tile(256, 4, 8, 7), "halves", split_k=2),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with as many stages as fit: codes of a byte take more than nibbles."""
    return with_stages_that_fit(tactic, lambda tactic, stage: _exceeds(problem, tactic, stage))


def _exceeds(problem: MoeProblem, tactic: Tactic, stage: int) -> bool:
    """Whether the programs that share a processor need more shared memory than it has."""
    return shared_bytes(problem, tactic, stage) * programs(tactic.tiles[stage - 1].warps) > SHARED_BYTES


def registers(warps: int, turn: int) -> tuple[int, int]:
    """Of each thread of (a consumer, the producer). Where ptxas finds too few: C7512, see the kernel."""
    if warps == 4:
        return 200, 56
    return (224, 56) if turn > 1 else (216, 72)


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if not has_wgmma():
        return (
            "the warp-specialized path needs the tensor cores of compute capability 9.0, and no interpreter"
        )
    if problem.weight_format not in PACKED or problem.input_format is not None:
        return f"the warp-specialized path takes {', '.join(PACKED)} weights and activations as they are"
    packed = PACKED[problem.weight_format]
    if packed.SCALE.itemsize > 4 * packed.SCALE_ROWS:
        return (
            f"the warp-specialized path copies at most 4 bytes of scales a row, not {packed.SCALE.itemsize}"
        )
    if tactic.route != "sorted":
        return "the warp-specialized path takes sorted pairs"
    if tactic.split_k > 1 and (reason := _no_parts(problem, tactic.split_k)):
        return reason
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
        by_quarters = extra > 0 and most > 64 and tactic.narrow == "quarters"
        if tile.rows * width > SUMS[tile.warps] * 32 * tile.warps or by_quarters:
            return "a tile has no more sums than registers, and by quarters only a power of two or 96 pairs"
        if _exceeds(problem, tactic, stage):
            return "its tiles exceed shared memory"
    return None


def _no_parts(problem: MoeProblem, split_k: int) -> str | None:
    """Why the columns of the second product are not shared out."""
    columns = problem.intermediate_size
    if problem.batch_invariant:
        return "parts of a sum over the columns that depend on the tactic are not batch-invariant"
    if columns % (64 * split_k) or columns < LONG * split_k:
        return f"{split_k} parts of {columns} columns must be of whole blocks of 64, and of {LONG} at least"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, width = tactic.of_stage(stage)
    packed = PACKED.get(problem.weight_format)
    row = 128 if packed is None else packed.row_bytes()
    return (width * 128 + tile.rows * row + 16) * tile.stages + BESIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: decoding is beside the products, and slows them."""
    products = path.estimates(problem, tactic, num_tokens)
    seconds = path.launches(tactic) + sum(max(e.memory, e.products / 0.9 + e.decoding / 2) for e in products)
    return seconds * path.walk(problem, tactic, num_tokens)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    return calls.scratch(problem, num_tokens, tactic, x_rows, half=True)


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it: a routing weight would need registers here
    call.by_size = True
    call.two_products(_product)


def _product(call: Call, stage: int, rows: Rows, out: torch.Tensor) -> None:
    from moestro.kernels.triton.device import warp_specialized as kernels

    tile, pairs = call.tactic.of_stage(stage)
    groups, each = tile.warps // 4, programs(tile.warps)
    consumer, producer = registers(tile.warps, tile.k_blocks)
    width, extra = path.parts(pairs)
    routing, stride = call.routing(stage)
    narrow = narrow_code(kernels, call.tactic.narrow)
    split = call.tactic.split_k if stage == 2 else 1
    odd = triton.cdiv(sizes(call.p, stage)[1], 64) // split % 2 == 1
    grid = kernels.Grid(tile.rows, width, extra, groups, tile.k_blocks, tile.stages, call.tactic.raster_group,
                        narrow, odd, consumer, producer)  # fmt: skip
    call.add(
        kernels.wide_gemm, (call.processors * each,), rows.data, routing, stride, call.weights_of(stage), out,
        call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1, each),
    )  # fmt: skip

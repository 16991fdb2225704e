"""Weights decoded in the registers that feed the tensor core; a launch for each product (device/fused.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import multiplies_fp4
from moestro.kernels.triton.device import fused as kernels
from moestro.kernels.triton.device.arguments import Rows, Schedule
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.tactic import (
    SHARED_BYTES,
    Tactic,
    Tile,
    gated,
    num_slots,
    sizes,
)
from moestro.kernels.triton.words import kernel_rows_of

NAME = "fused"
WGMMA = 64, 4, 16  # rows, warps, pairs: less is mma.sync


def tactic(pairs: int, gemm1: Tile, gemm2: Tile, route: str = "sorted", narrow: str = "", pairs2: int = 0,
           split_k: int = 1, overlap_steps: bool = True) -> Tactic:  # fmt: skip
    """A tactic of this path."""
    return Tactic(NAME, route, pairs, gemm1, gemm2, narrow, pairs2, split_k, overlap_steps)


# What wins somewhere on an H100, or is close, of NVFP4 weights and bf16 activations: of the tactics in
# benchmarks/results/h100-candidates.json, those without which a measured cell would lose more than 1 %.
# k_blocks (the second number of a tile) is halved until it divides a problem's blocks (`_step`).
_OTHERS: tuple[Tactic, ...] = (
    tactic(8, Tile(32, 4, 2, 4), Tile(32, 4, 2, 4), "direct"),
    tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), "direct"),
    tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), "direct", split_k=4),
    tactic(8, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3), "direct"),
    tactic(16, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), "direct"),
    tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4)),
    tactic(8, Tile(32, 4, 2, 4), Tile(32, 4, 2, 4)),
    tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), split_k=2),
    tactic(16, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), overlap_steps=False),
    tactic(32, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4)),
    tactic(32, Tile(128, 2, 8, 3), Tile(128, 2, 4, 3)),
    tactic(32, Tile(128, 2, 4, 4), Tile(128, 2, 4, 4)),
    tactic(64, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3), narrow="quarters"),
    tactic(128, Tile(128, 1, 8, 4), Tile(128, 2, 4, 3), narrow="quarters", pairs2=64),
    tactic(128, Tile(128, 1, 8, 4), Tile(256, 1, 8, 4), narrow="quarters"),
)
TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "packed": (
        tactic(8, Tile(32, 4, 2, 4), Tile(32, 4, 2, 4), "direct"),
        tactic(8, Tile(64, 2, 4, 4), Tile(128, 2, 4, 3), "direct"),
        tactic(8, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3), "direct"),
        tactic(8, Tile(32, 4, 2, 4), Tile(32, 4, 2, 4), "direct", split_k=4),
        tactic(64, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3), narrow="quarters"),
        tactic(128, Tile(128, 1, 8, 4), Tile(128, 2, 4, 3), narrow="quarters", pairs2=64),
    ),
    "dense": _OTHERS,
    "nvfp4": _OTHERS,
    "rounded": _OTHERS,
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with steps that divide the problem's columns, and stages that fit."""
    blocks = -(-problem.hidden_size // 64), -(-problem.intermediate_size // 64)
    split = tactic.split_k if blocks[1] % tactic.split_k == 0 else 1
    tiles = []
    for count, tile in zip((blocks[0], blocks[1] // split), tactic.tiles, strict=True):
        tiles.append(tile._replace(k_blocks=_step(count, tile.k_blocks)))
    overlap = tactic.overlap_steps or min(tile.k_blocks for tile in tiles) < 2
    found = replace(tactic, gemm1=tiles[0], gemm2=tiles[1], split_k=split, overlap_steps=overlap)
    return with_stages_that_fit(
        found, lambda found, stage: shared_bytes(problem, found, stage) > SHARED_BYTES
    )


def _step(blocks: int, wanted: int) -> int:
    """The wanted number of blocks a step, halved until it divides; three instead of one where that does (45 blocks of
    gpt-oss's 2880 columns)."""
    step = wanted
    while blocks % step:
        step //= 2
    return 3 if step == 1 < wanted and blocks % 3 == 0 else step


def with_stages_that_fit(tactic: Tactic, exceeds: Callable[[Tactic, int], bool]) -> Tactic:
    """Fewer stages, two at least, where they exceed shared memory: codes of a byte take more than nibbles."""
    while exceeds(tactic, 1) and tactic.gemm1.stages > 2:
        tactic = replace(tactic, gemm1=tactic.gemm1._replace(stages=tactic.gemm1.stages - 1))
    while exceeds(tactic, 2) and tactic.gemm2.stages > 2:
        tactic = replace(tactic, gemm2=tactic.gemm2._replace(stages=tactic.gemm2.stages - 1))
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path, or of the chain, cannot run a problem."""
    if multiplies_fp4(problem):
        return "weights stay as the checkpoint has them for FP4 tensor cores, which are another path's"
    if tactic.narrow == "halves":
        return "these tiles are narrower by quarters, or not at all"
    tiles = tactic.tiles
    if not tactic.overlap_steps and min(tile.k_blocks for tile in tiles) < 2:
        return "steps of one block must not run on into the next"
    if problem.batch_invariant:
        if tactic.split_k > 1:
            return "parts of a sum over the columns that depend on the tactic are not batch-invariant"
        for tile, pairs in zip(tiles, tactic.widths, strict=True):
            if any(have < need for have, need in zip((tile.rows, tile.warps, pairs), WGMMA, strict=True)):
                return (
                    "mma.sync, of small tiles, adds in another order than wgmma, which is not batch-invariant"
                )
    steps = (tiles[0].k_blocks, tiles[1].k_blocks * tactic.split_k)
    for size, step in zip((problem.hidden_size, problem.intermediate_size), steps, strict=True):
        if -(-size // 64) % step:
            return f"steps of {step} blocks do not divide {size} columns"
    if any(shared_bytes(problem, tactic, stage) > SHARED_BYTES for stage in (1, 2)):
        return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the pipeline buffers of a product, as Triton lays them out: a wgmma that still runs reads a stage of x, and of
    dense weights, more than those that are being copied; weights that are decoded are in registers by then.
    """
    tile, width = tactic.of_stage(stage)
    packed = PACKED.get(problem.weight_format)
    copied = tile.stages - 1
    read = copied + (tile.rows >= WGMMA[0] and tile.warps >= WGMMA[1])
    weights = tile.rows * (128 * read if packed is None else packed.row_bytes() * copied)
    return (weights + width * 128 * read) * tile.k_blocks


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: decoding and products take turns."""
    products = path.estimates(problem, tactic, num_tokens)
    return path.launches(tactic) + sum(max(e.memory, e.products + e.decoding, e.operands) for e in products)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    return calls.scratch(problem, num_tokens, tactic, x_rows)


def launch(call: Call) -> None:
    call.two_products(_product)


def _product(call: Call, stage: int, rows: Rows, out: torch.Tensor) -> None:
    routing, stride = call.routing(stage)
    slots, tile = schedule(call, stage)
    call.add(
        kernels.moe_gemm, (slots * strips(call, stage),), rows, routing, stride, call.pairs, slots,
        call.weights_of(stage), out, call.size(stage), HOW=call.product(stage), TILE=tile,
        num_warps=call.tactic.tiles[stage - 1].warps,
    )  # fmt: skip


def schedule(call: Call, stage: int) -> tuple[int, Schedule]:
    """(slots of pairs, rounded up to whole groups; how a product's tiles are computed)."""
    t = call.tactic
    tile, width = t.of_stage(stage)
    direct = t.route == "direct"
    route = kernels.SORTED if not direct else kernels.SINGLE if call.num_tokens == 1 else kernels.DIRECT
    slots = call.pairs if direct else num_slots(call.p, call.pairs, width)
    group = min(t.raster_group, triton.next_power_of_2(slots))
    search = max(16, triton.next_power_of_2(call.pairs)) if direct else 16
    how = Schedule(tile.rows, width, t.narrow == "quarters", tile.k_blocks, tile.stages, t.overlap_steps,
                   route.value, search, group, t.prefetch_kib << 10)  # fmt: skip
    return triton.cdiv(slots, group) * group, how


def strips(call: Call, stage: int) -> int:
    """Tiles of a slot."""
    rows = kernel_rows_of(sizes(call.p, stage)[0], gated(call.p, stage))
    split = call.tactic.split_k if stage == 2 else 1
    return int(triton.cdiv(rows, call.tactic.tiles[stage - 1].rows) * split)

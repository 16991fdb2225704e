"""e4m3 weights and activations (device/fp8_gemm.py): FP8 checkpoints in place, 4-bit weights decoded once a call.

For FP8 blocks both have a scale for each 128 columns (DeepSeek-V3's recipe), and the first product's epilogue quantises
the intermediate. 4-bit weights are decoded to scratch memory that all layers share, one product after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.device.fp8 import BLOCKS, ROWS, Grid
from moestro.kernels.triton.fp8_layout import TritonE4M3, TritonFP4, descriptor
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.fp8 import BESIDE, fp8_scratch, unfit_for_fp8
from moestro.kernels.triton.paths.registers import most_registers
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, gated, sizes
from moestro.kernels.triton.words import kernel_rows_of

NAME = "fp8_once"
CONSUMER, PRODUCER = 216, 72  # registers of a thread
WEIGHT_ROWS = 256


def tactic(pairs: int, tile: Tile, raster_group: int = 8) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile, raster_group=raster_group)


LARGE = tactic(128, Tile(WEIGHT_ROWS, 2, 8, 4))
TABLE: Mapping[str, tuple[Tactic, ...]] = {"fp8": (tactic(64, Tile(WEIGHT_ROWS, 2, 4, 4)), LARGE)}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("nvfp4", "mxfp4", "fp8_block"))
    if reason is not None:
        return reason
    if in_blocks(problem) and problem.activation.gated and problem.intermediate_size % 128:
        return "gate and up of FP8 blocks must each be whole blocks of 128 rows"
    for stage in (1, 2):
        tile, pairs = tactic.of_stage(stage)
        if (pairs, tile.warps) not in ((64, 4), (128, 8)) or tile.rows != WEIGHT_ROWS or tile.k_blocks != 2:
            return f"a tile has 64 or 128 pairs for 4 or 8 warps, {WEIGHT_ROWS} rows, and 2 blocks of columns"
        if tile.stages < 2 or shared_bytes(problem, tactic, stage) > SHARED_BYTES:
            return "its tiles have fewer than 2 stages, or exceed shared memory"
    return None


def in_blocks(problem: MoeProblem) -> bool:
    """Whether scales are those of FP8 blocks."""
    return problem.weight_format == "fp8_block"


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, pairs = tactic.of_stage(stage)
    return (pairs + tile.rows) * 128 * tile.stages + BESIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: products at 1.5 times bf16's rate; decoding once reads and writes 1.56 bytes a weight."""
    total = path.launches(tactic) + path.LAUNCH * (1 if in_blocks(problem) else 4)
    for e in path.estimates(problem, tactic, num_tokens):
        bytes_once = e.weights / path.HBM
        total += max(bytes_once, e.products / 1.5)
        total += 0.0 if in_blocks(problem) else 1.56 * bytes_once
    return total


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    plan = dict(fp8_scratch(problem, num_tokens, tactic, num_tokens, in_blocks(problem)))
    if in_blocks(problem):
        del plan["act_values"]  # the first product writes them
    else:
        size = max(_padded(problem, stage) * sizes(problem, stage)[1] for stage in (1, 2))
        plan["dense"] = ((problem.num_local_experts * size,), torch.float8_e4m3fn)
    return plan


def _padded(problem: MoeProblem, stage: int) -> int:
    return kernel_rows_of(sizes(problem, stage)[0], gated(problem, stage))


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = True
    call.sort()
    blocks = in_blocks(call.p)
    x = call.to_e4m3(call.x, "x", blocks=blocks)
    if blocks:
        act = Rows(call.s["act"], call.s["act_scale"])
        _product(call, 1, x, act)
    else:
        _product(call, 1, x, Rows(call.s["act"], None))
        act = call.to_e4m3(call.s["act"], "act")
    _product(call, 2, act, Rows(call.s["partial"], None))
    call.sum_pairs()


def _product(call: Call, stage: int, x: Rows, out: Rows) -> None:
    from moestro.kernels.triton.device import fp8_gemm as kernels

    tile, pairs = call.tactic.of_stage(stage)
    columns = sizes(call.p, stage)[1]
    padded, groups = _padded(call.p, stage), tile.warps // 4
    w_desc = descriptor(_e4m3(call, stage, padded, columns), WEIGHT_ROWS)
    x_desc = w_desc if stage == 1 else descriptor(x.data, pairs)  # the first product gathers
    routing, stride = call.routing(stage)
    grid = Grid(tile.rows, groups, 1, 0, tile.stages, 0, call.tactic.raster_group,
                (BLOCKS if in_blocks(call.p) else ROWS).value, columns % 128 == 0, CONSUMER, PRODUCER)  # fmt: skip
    call.add(
        kernels.fp8_gemm, (call.processors,), x, x_desc, routing, stride, call.weights_of(stage), w_desc, padded, out,
        call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1),
    )  # fmt: skip


def _e4m3(call: Call, stage: int, padded: int, columns: int) -> torch.Tensor:
    """Weights [L * padded, columns]; decoded ones take the same memory in turn."""
    weights = call.experts.gate_up if stage == 1 else call.experts.down
    if isinstance(weights, TritonE4M3):
        return weights.words.view(-1, columns)
    assert isinstance(weights, TritonFP4)
    from moestro.kernels.triton.device import fp8_decode as kernels

    strips, blocks = call.p.num_local_experts * padded // 64, triton.cdiv(columns, 128)
    flat = call.s["dense"][: strips * 64 * columns].view(-1, columns)
    args = (weights.words, weights.scales, flat, blocks, columns)
    call.add(
        kernels.expand_fp8,
        (strips, triton.cdiv(blocks, 4)),
        *args,
        EVEN=columns % 128 == 0,
        COLS=4,
        num_warps=4,
    )
    return flat

"""4-bit weights and e4m3 activations, decoded beside the products (device/fp8_decode.py): one tactic is one tile.

x is quantised once per pair, in the order of its expert's pairs, so that the tensor memory accelerator can fetch it; the
intermediate once it is whole, since its scale is its row's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import has_wgmma
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.device.fp8 import PLACES, Grid
from moestro.kernels.triton.fp8_layout import TritonFP4, descriptor
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.registers import most_registers
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, gated, sizes
from moestro.kernels.triton.words import kernel_rows_of

NAME = "fp8"
BESIDE = 20_480  # shared bytes beside the rings: barriers, and what turns results
# (pairs, rows, warps that multiply) -> (blocks of 64 pairs a group, groups that decode, their registers, a multiplier's)
SHAPES = {
    (64, 256, 4): (1, 2, 144, 0),
    (128, 128, 8): (1, 2, 96, 160),
    (128, 256, 8): (1, 1, 88, 208),
    (256, 128, 8): (2, 1, 88, 208),
}


def tactic(pairs: int, tile: Tile, raster_group: int = 8) -> Tactic:
    """A tactic of this path, with one tile for both products; tile.k_blocks is the buffers of codes."""
    return Tactic(NAME, "sorted", pairs, tile, tile, raster_group=raster_group)


TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(64, Tile(256, 4, 4, 3)),
        tactic(128, Tile(128, 4, 8, 4)),
        tactic(128, Tile(256, 3, 8, 3)),
        tactic(256, Tile(128, 4, 8, 3)),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("nvfp4", "mxfp4"))
    if reason is not None:
        return reason
    for stage in (1, 2):
        tile, pairs = tactic.of_stage(stage)
        if (pairs, tile.rows, tile.warps) not in SHAPES or not 2 <= tile.k_blocks <= 6 or tile.stages < 2:
            return f"(pairs, rows, warps) of a tile must be one of {', '.join(map(str, SHAPES))}, with 2 stages at least"
        if shared_bytes(problem, tactic, stage) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return None


def unfit_for_fp8(problem: MoeProblem, tactic: Tactic, formats: tuple[str, ...]) -> str | None:
    """Why no FP8 path could: its chip, problem and route; formats: of the weights that this one takes."""
    if not has_wgmma():
        return "FP8 products need the tensor cores of compute capability 9.0, and no interpreter"
    if problem.input_format != "fp8":
        return f"FP8 products take e4m3 activations (input_format='fp8'), not {problem.input_format!r}"
    if problem.hidden_size % 16 or problem.intermediate_size % 16:
        return "the tensor memory accelerator needs rows of a multiple of 16 bytes"
    if problem.weight_format not in formats:
        return f"path {tactic.path!r} takes weights of {', '.join(formats)}, not {problem.weight_format!r}"
    one_width = tactic.pairs2 in (0, tactic.pairs1)
    if tactic.route != "sorted" or tactic.split_k != 1 or tactic.narrow or not one_width:
        return f"path {tactic.path!r} takes sorted pairs, whole columns, and tiles of one width"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of both rings, and what is beside them."""
    tile, pairs = tactic.of_stage(stage)
    return (pairs + tile.rows) * 128 * tile.stages + tile.rows * 72 * tile.k_blocks + BESIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: products at 1.1 times bf16's rate, or decoding at 4.7 (two groups) or 2.6 T weights/s."""
    total = path.launches(tactic) + path.LAUNCH * 2
    for stage, e in enumerate(path.estimates(problem, tactic, num_tokens), 1):
        tile, width = tactic.of_stage(stage)
        each = num_tokens * problem.top_k / problem.num_experts
        rounds = path.expected(max(1.0, each), width, "")[0]
        rate = 4.7e12 if SHAPES[width, tile.rows, tile.warps][1] == 2 else 2.6e12
        total += max(e.memory, e.products / 1.1, e.weights * rounds / rate)
    return total


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    return fp8_scratch(problem, num_tokens, tactic, num_tokens * problem.top_k)


def fp8_scratch(
    problem: MoeProblem,
    num_tokens: int,
    tactic: Tactic,
    x_rows: int,
    blocks: bool = False,
    whole: bool = False,
) -> Plan:
    """The workspace of a call whose x and intermediate are e4m3.

    blocks: with a scale for each 128 columns; whole: in rows of whole blocks of 128.
    """
    p, pairs = problem, num_tokens * problem.top_k
    plan = dict(calls.scratch(problem, num_tokens, tactic, x_rows, half=True))
    # in float32: where bfloat16 rounds first, one value in 64 is rounded to another e4m3, 1.1 % of the result
    plan["act"] = ((pairs, p.intermediate_size), torch.float8_e4m3fn if blocks else torch.float32)
    for name, rows, columns in (("x", x_rows, p.hidden_size), ("act", pairs, p.intermediate_size)):
        num_blocks = -(-columns // 128)
        plan[f"{name}_values"] = ((rows, num_blocks * 128 if whole else columns), torch.float8_e4m3fn)
        plan[f"{name}_scale"] = ((rows, num_blocks) if blocks else (rows,), torch.float32)
    return plan


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = True
    call.sort()
    _product(call, 1, call.to_e4m3(call.x, "x", gather=True), call.s["act"])
    _product(call, 2, call.to_e4m3(call.s["act"], "act"), call.s["partial"])
    call.sum_pairs()


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    tile, pairs = call.tactic.of_stage(stage)
    parts, decoders, producer, consumer = SHAPES[pairs, tile.rows, tile.warps]
    groups = tile.warps // 4
    rows, columns = sizes(call.p, stage)
    weights = call.experts.gate_up if stage == 1 else call.experts.down
    assert isinstance(weights, TritonFP4)
    routing, stride = call.routing(stage)
    grid = Grid(tile.rows, groups, parts, decoders, tile.stages, tile.k_blocks, call.tactic.raster_group, PLACES.value,
                columns % 128 == 0, consumer, producer)  # fmt: skip
    from moestro.kernels.triton.device import fp8_decode as kernels

    call.add(
        kernels.fp4_fp8_gemm, (call.processors,), x, descriptor(x.data, pairs), routing, stride, call.weights_of(stage),
        kernel_rows_of(rows, gated(call.p, stage)), Rows(out, None), call.size(stage), HOW=call.product(stage), TILE=grid,
        num_warps=4, maxnreg=most_registers(groups + decoders),
    )  # fmt: skip

"""4-bit weights and e4m3 activations, decoded in registers (device/fp8_registers.py): one tactic is one tile.

x is quantised once per token and gathered by the first product's producer; the intermediate once it is whole, since
its scale is its row's. Both are written in the order of columns that the products take.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.device.fp8 import Recipe, quantize_fp8
from moestro.kernels.triton.fp8_layout import COLS, TritonFP4
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.fp8 import unfit_for_fp8
from moestro.kernels.triton.paths.registers import THREADS, most_registers, narrow_code, programs
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile

NAME = "fp8_registers"
SUMS, OVERLAPPED_SUMS = 128, 96  # registers of a thread for sums, at most
BESIDE = 10_240  # shared bytes beside the ring: barriers, and what turns results
AT_ONCE = 8192  # columns that a program keeps in registers while it looks for the largest
ROW_BYTES = 72  # codes and scales of a row of a stage


def tactic(pairs: int, tile: Tile, narrow: str = "", overlap: bool = False) -> Tactic:
    """A tactic of this path, with one tile for both products; tile.k_blocks is the stages of a producer's turn."""
    return Tactic(NAME, "sorted", pairs, tile, tile, narrow, overlap_steps=overlap)


TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(16, Tile(128, 2, 4, 8), overlap=True),
        tactic(16, Tile(256, 4, 8, 10), overlap=True),
        tactic(32, Tile(128, 2, 4, 7), overlap=True),
        tactic(32, Tile(256, 2, 8, 9), overlap=True),
        tactic(64, Tile(256, 2, 8, 8), "halves", True),
        tactic(96, Tile(128, 2, 8, 9), "halves"),
        tactic(96, Tile(256, 2, 8, 7), "halves"),
        tactic(96, Tile(256, 2, 8, 7), "halves", True),
        tactic(128, Tile(128, 2, 8, 8), "halves"),
        tactic(128, Tile(256, 2, 8, 6), "halves"),
        tactic(192, Tile(128, 2, 8, 6), "halves"),
        tactic(256, Tile(128, 2, 8, 5), "halves"),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def sums(tile: Tile, pairs: int) -> int:
    """Registers of a thread for the sums of a tile."""
    return tile.rows * pairs // (THREADS * tile.warps // 4)


def registers(tile: Tile, pairs: int) -> tuple[int, int]:
    """Of each thread of (a consumer, the producer). Where ptxas finds too few: C7512, see warp_specialized.py.

    Beside 128 sums stand two products of 32 and an operand of 16 or two; the producer then spills some addresses.
    """
    if tile.warps == 4:
        return 200, 56
    return (232, 40) if sums(tile, pairs) > 96 else (208, 88)


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("nvfp4", "mxfp4"), narrow=True)
    if reason is not None:
        return reason
    if problem.batch_invariant:  # another order of columns, and of roundings of the intermediate
        return "its sums are not those of paths 'fp8' and 'fp8_once' bit by bit, which batch-invariant problems keep to"
    for stage in (1, 2):
        tile, width = tactic.of_stage(stage)
        per_group = 16 * tile.warps
        if tile.warps not in (4, 8) or tile.rows not in (per_group, 2 * per_group):
            return "a tile has 64 or 128 rows for each 4 of 4 or 8 warps"
        if tile.k_blocks not in (1, 2, 4) or tile.stages < 2:
            return "a tile has 1, 2 or 4 stages a turn, and 2 stages at least"
        most, extra = path.parts(width)
        if not 16 <= most <= 256 or extra not in (0, 16, 32, 64) or extra == most:
            return "a tile has 16 to 256 pairs, a power of two, or 16, 32 or 64 more"
        if sums(tile, width) > SUMS or (extra and tactic.narrow == "quarters"):
            return "a tile has no more sums than registers, and by quarters only a power of two"
        if tactic.overlap_steps and (tile.rows == per_group or sums(tile, width) > OVERLAPPED_SUMS):
            return "operands are decoded ahead in tiles of 128 rows for each 4 warps and at most 96 sums a thread"
        if shared_bytes(problem, tactic, stage) * programs(tile.warps) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, width = tactic.of_stage(stage)
    return (width * COLS + tile.rows * ROW_BYTES + 16) * tile.stages + BESIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: products at 1.5 times bf16's rate, and decoding beside them at 9 T weights/s."""
    total = path.launches(tactic) + path.LAUNCH * 2
    for stage, e in enumerate(path.estimates(problem, tactic, num_tokens), 1):
        width = tactic.of_stage(stage)[1]
        each = num_tokens * problem.top_k / problem.num_experts
        rounds = path.expected(max(1.0, each), width, tactic.narrow)[0]
        total += max(e.memory, e.products / 1.5, e.weights * rounds / 9e12)
    return total


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    p, pairs = problem, num_tokens * problem.top_k
    plan = dict(calls.scratch(problem, num_tokens, tactic, x_rows, half=True))
    # in float32: where bfloat16 rounds first, one value in 64 is rounded to another e4m3, 1.1 % of the result
    plan["act"] = ((pairs, p.intermediate_size), torch.float32)
    for name, rows, columns in (("x", num_tokens, p.hidden_size), ("act", pairs, p.intermediate_size)):
        plan[f"{name}_values"] = ((rows, _whole(columns)), torch.float8_e4m3fn)
        plan[f"{name}_scale"] = ((rows,), torch.float32)
    return plan


def _whole(columns: int) -> int:
    return -(-columns // COLS) * COLS


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = True
    call.sort()
    _product(call, 1, _quantized(call, call.x, "x", beside=True), call.s["act"])
    _product(call, 2, _quantized(call, call.s["act"], "act"), call.s["partial"])
    call.sum_pairs()


def _quantized(call: Call, rows: torch.Tensor, name: str, beside: bool = False) -> Rows:
    """Rows as e4m3, in whole blocks of 128 columns that are turned; x beside the sort, which it does not read."""
    data, scale = call.s[f"{name}_values"], call.s[f"{name}_scale"]
    columns, width = rows.shape[1], triton.next_power_of_2(data.shape[1])
    whole = width <= AT_ONCE
    p = call.p
    how = Recipe(False, False, p.top_k, p.expert_offset, p.num_local_experts, width if whole else 2048, True, whole,
                 beside)  # fmt: skip
    args = (rows, call.ids, call.ids, data, scale, columns)
    call.add(quantize_fp8, (data.shape[0],), *args, HOW=how, num_warps=8 if whole and width > 2048 else 4)
    return Rows(data, scale)


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    from moestro.kernels.triton.device import fp8_registers as kernels

    tile, pairs = call.tactic.of_stage(stage)
    groups, each = tile.warps // 4, programs(tile.warps)
    consumer, producer = registers(tile, pairs)
    width, extra = path.parts(pairs)
    assert isinstance(call.packed(stage), TritonFP4)
    routing, stride = call.routing(stage)
    narrow = narrow_code(kernels, call.tactic.narrow)
    grid = kernels.Grid(tile.rows, width, extra, groups, tile.k_blocks, tile.stages,
                        call.tactic.raster_group, narrow, call.tactic.overlap_steps, consumer, producer)  # fmt: skip
    call.add(
        kernels.fp4_fp8_registers, (call.processors * each,), x, routing, stride, call.weights_of(stage), out,
        call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1, each),
    )  # fmt: skip

"""4-bit weights and e4m3 activations, decoded in registers (device/fp8_registers.py): one tactic is one tile.

x is quantised once per token and gathered by the first product's producer, or once per pair where tiles are wide, so that
the tensor memory accelerator copies it; the intermediate once it is whole, since its scale is its row's. Both are written
in the order of columns that the products take.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.fp8_layout import COLS, TritonFP4, boxes_of_weights, descriptor
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.fp8 import unfit_for_fp8
from moestro.kernels.triton.paths.registers import THREADS, most_registers, narrow_code, programs
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile

NAME = "fp8_registers"
SPAN = 4  # blocks of 128 columns that the tensor core adds itself (device/fp8_sums.py)
STEP = 4  # blocks of 64 columns a stage
# Up to as many bytes of all pairs' rows, wide tiles read x by place: K times the rows, and a producer of one warp without a
# fence. Qwen3 at 1024 tokens 4 % faster, DeepSeek-V3 at 256 and 1024 within 3 %, at 4096 3 to 6 % slower (H200).
BY_PLACE, WIDE = 64 << 20, 80
BESIDE = 10_240  # shared bytes beside the ring: barriers, and what turns results
ROW_BYTES = 72  # codes and scales of a row and 128 columns
# sums, products and operands of a thread -> its registers; the producer has what two consumers leave of 504
REGISTERS = ((160, 208), (176, 216), (192, 224), (208, 232))


def tactic(pairs: int, tile: Tile, narrow: str = "", overlap: bool = True) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile, narrow, overlap_steps=overlap)


TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(16, Tile(128, STEP, 4, 4)),
        tactic(32, Tile(128, STEP, 4, 3)),
        tactic(32, Tile(256, STEP, 8, 4)),
        tactic(64, Tile(128, STEP, 4, 3), "halves"),
        tactic(80, Tile(128, STEP, 8, 5), "halves"),
        tactic(96, Tile(128, STEP, 8, 5), "halves"),
        tactic(128, Tile(128, STEP, 8, 4), "halves"),
        tactic(144, Tile(128, STEP, 8, 4), "halves"),
        tactic(160, Tile(128, STEP, 8, 3), "halves"),
        tactic(192, Tile(128, STEP, 8, 3), "halves", overlap=False),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def sums(tile: Tile, pairs: int) -> int:
    """Registers of a thread for the sums of a tile."""
    return tile.rows * pairs // (THREADS * tile.warps // 4)


def strips(tile: Tile) -> int:
    """Of 64 rows, a consumer."""
    return tile.rows // (16 * tile.warps)


def registers(tile: Tile, pairs: int, overlap: bool) -> tuple[int, int]:
    """Of each thread of (a consumer, the producer). Where ptxas finds too few: C7512, see warp_specialized.py."""
    needed = 2 * sums(tile, pairs) + (32 if overlap else 16) + 16 * (strips(tile) - 1)
    if tile.warps == 4:
        return (200, 56) if needed <= 160 else (208, 48)
    return next((most, 504 - 2 * most) for limit, most in REGISTERS if needed <= limit)


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("nvfp4", "mxfp4"), narrow=True)
    if reason is not None:
        return reason
    if problem.batch_invariant:  # another order of columns, and spans of columns that the tensor core adds
        return "its sums are not those of paths 'fp8' and 'fp8_once' bit by bit, which batch-invariant problems keep to"
    for stage in (1, 2):
        tile, width = tactic.of_stage(stage)
        if tile.warps not in (4, 8) or tile.rows not in (16 * tile.warps, 32 * tile.warps):
            return "a tile has 64 or 128 rows for each 4 of 4 or 8 warps"
        if tile.k_blocks != STEP or tile.stages < 2:
            return f"a tile has {STEP} blocks of 64 columns a stage, and 2 stages at least"
        most, extra = path.parts(width)
        if not 16 <= most <= 128 or extra not in (0, 16, 32, 64) or extra == most:
            return "a tile has 16 to 128 pairs, a power of two, or 16, 32 or 64 more"
        if tactic.narrow == "quarters":
            return "a tile of few pairs is half of one"
        room = 64 if strips(tile) == 2 else 80 if tactic.overlap_steps else 96
        if (have := sums(tile, width)) > room:
            return (
                f"a tile of {have} sums a thread, where {room} leave registers for its products and operands"
            )
        if shared_bytes(problem, tactic, stage) * programs(tile.warps) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, width = tactic.of_stage(stage)
    return (2 * (width * COLS + tile.rows * ROW_BYTES) + 16) * tile.stages + BESIDE


def gathers(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> bool:
    """Whether the first product's producer gathers rows of x by token."""
    return tactic.pairs1 < WIDE or num_tokens * problem.top_k * problem.hidden_size > BY_PLACE


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
    x_rows = num_tokens if gathers(p, tactic, num_tokens) else pairs
    for name, rows, columns in (("x", x_rows, p.hidden_size), ("act", pairs, p.intermediate_size)):
        plan[f"{name}_values"] = ((rows, _whole(columns)), torch.float8_e4m3fn)
        plan[f"{name}_scale"] = ((rows,), torch.float32)
    return plan


def _whole(columns: int) -> int:
    return -(-columns // COLS) * COLS


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = True
    call.sort()
    gather = gathers(call.p, call.tactic, len(call.ids))
    # by token x is quantised beside the sort, which it does not read
    x = call.to_e4m3(call.x, "x", gather=not gather, turned=True, beside=gather)
    _product(call, 1, x, call.s["act"])
    _product(call, 2, call.to_e4m3(call.s["act"], "act", turned=True), call.s["partial"])
    call.sum_pairs()


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    from moestro.kernels.triton.device import fp8_registers as kernels

    tile, pairs = call.tactic.of_stage(stage)
    groups, each = tile.warps // 4, programs(tile.warps)
    consumer, producer = registers(tile, pairs, call.tactic.overlap_steps)
    width, extra = path.parts(pairs)
    weights = call.packed(stage)
    assert isinstance(weights, TritonFP4)
    codes, scales = boxes_of_weights(weights, tile.rows)
    x_desc = piece = codes  # not read where x is gathered
    gather = stage == 1 and gathers(call.p, call.tactic, len(call.ids))
    if not gather:
        x_desc, piece = descriptor(x.data, width), descriptor(x.data, min(width // 2, extra or width))
    routing, stride = call.routing(stage)
    narrow, powers = narrow_code(kernels, call.tactic.narrow), weights.format == "mxfp4"
    grid = kernels.Grid(tile.rows, width, extra, groups, tile.stages, call.tactic.raster_group, narrow,
                        call.tactic.overlap_steps, consumer, producer, SPAN, gather, powers)  # fmt: skip
    call.add(
        kernels.fp4_fp8_registers, (call.processors * each,), x, x_desc, piece, routing, stride,
        call.weights_of(stage), codes, scales, out, call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1, each),
    )  # fmt: skip

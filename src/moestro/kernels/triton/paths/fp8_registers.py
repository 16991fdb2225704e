"""4-bit weights and e4m3 activations, decoded in registers (device/fp8_registers.py): one tactic is one tile.

x is quantised once per token and gathered by the first product's producer; the intermediate once it is whole, since
its scale is its row's. Both are written in the order of columns that the products take.
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
SUMS, OVERLAPPED_SUMS = 128, 96  # registers of a thread for sums, at most
SPAN = 4  # blocks of 128 columns that a product adds itself, where it has registers of its own
SPAN_SUMS = {1: 96, 2: 64}  # blocks of 64 rows a consumer -> registers for sums beside as many of products
BESIDE = 10_240  # shared bytes beside the ring: barriers, and what turns results
ROW_BYTES = 72  # codes and scales of a row of a stage


def tactic(pairs: int, tile: Tile, narrow: str = "", overlap: bool = False, span: int = 1) -> Tactic:
    """A tactic of this path, with one tile for both products; tile.k_blocks is the stages of a producer's turn."""
    return Tactic(NAME, "sorted", pairs, tile, tile, narrow, overlap_steps=overlap, span=span)


TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(16, Tile(128, 2, 4, 8), overlap=True),
        tactic(16, Tile(256, 4, 8, 10), overlap=True),
        tactic(32, Tile(128, 2, 4, 7), overlap=True),
        tactic(32, Tile(256, 2, 8, 9), overlap=True),
        tactic(64, Tile(128, 2, 4, 5), "halves"),
        tactic(64, Tile(256, 2, 8, 8), "halves", True),
        tactic(96, Tile(128, 2, 8, 9), "halves"),
        tactic(96, Tile(256, 2, 8, 7), "halves"),
        tactic(96, Tile(256, 2, 8, 7), "halves", True),
        tactic(128, Tile(128, 2, 8, 8), "halves"),
        tactic(128, Tile(256, 2, 8, 6), "halves"),
        tactic(192, Tile(128, 2, 8, 6), "halves"),
        tactic(256, Tile(128, 2, 8, 5), "halves"),
        tactic(16, Tile(128, 2, 4, 4), overlap=True, span=SPAN),
        tactic(32, Tile(128, 2, 4, 3), overlap=True, span=SPAN),
        tactic(32, Tile(256, 2, 8, 4), overlap=True, span=SPAN),
        tactic(64, Tile(128, 2, 4, 3), "halves", True, SPAN),
        tactic(64, Tile(256, 2, 8, 4), "halves", True, SPAN),
        tactic(80, Tile(128, 2, 8, 5), "halves", True, SPAN),
        tactic(96, Tile(128, 2, 8, 5), "halves", True, SPAN),
        tactic(128, Tile(128, 2, 8, 4), "halves", True, SPAN),
        tactic(144, Tile(128, 2, 8, 4), "halves", True, SPAN),
        tactic(160, Tile(128, 2, 8, 3), "halves", True, SPAN),
        tactic(192, Tile(128, 2, 8, 3), "halves", False, SPAN),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def sums(tile: Tile, pairs: int) -> int:
    """Registers of a thread for the sums of a tile."""
    return tile.rows * pairs // (THREADS * tile.warps // 4)


# registers of sums, products and operands -> of a consumer's thread; the producer has what two consumers leave of 504
SPAN_REGISTERS = ((160, 208), (176, 216), (192, 224), (208, 232))


def part_of(pairs: int) -> int:
    """Pairs of a product, at most: wide ones take fewer instructions (1 to 3 % of a layer); beside 128 sums stand two
    products of 64 as well as one of 128, and are as fast.
    """
    return 64 if pairs >= 256 else 128


def registers(tile: Tile, pairs: int, overlap: bool, span: int) -> tuple[int, int]:
    """Of each thread of (a consumer, the producer). Where ptxas finds too few: C7512, see warp_specialized.py.

    Beside the sums stand the products under way and an operand of 16 or two; with the fewest, the producer spills some
    addresses.
    """
    if tile.warps == 4:
        return (200, 56) if sums(tile, pairs) < 64 or span == 1 else (208, 48)
    if span > 1:
        needed = 2 * sums(tile, pairs) + (32 if overlap else 16) + (16 if tile.rows == 256 else 0)
        return next((most, 504 - 2 * most) for limit, most in SPAN_REGISTERS if needed <= limit)
    most, extra = path.parts(pairs)
    products = 64 if most > part_of(pairs) else (most + extra) // 2
    return (232, 40) if sums(tile, pairs) + products > 160 else (208, 88)


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
        if tactic.span > 1:
            if sums(tile, width) > SPAN_SUMS[tile.rows // per_group] or part_of(width) < 128:
                return f"a span's products stand beside at most {SPAN_SUMS} sums a thread, by blocks of 64 rows a consumer"
        elif tactic.overlap_steps and (tile.rows == per_group or sums(tile, width) > OVERLAPPED_SUMS):
            return "operands are decoded ahead in tiles of 128 rows for each 4 warps and at most 96 sums a thread"
        if shared_bytes(problem, tactic, stage) * programs(tile.warps) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    tile, width = tactic.of_stage(stage)
    return ((width * COLS + tile.rows * ROW_BYTES) * step_of(tactic) + 16) * tile.stages + BESIDE


def step_of(tactic: Tactic) -> int:
    """Blocks of 128 columns a stage: waiting for one, and giving it back, costs consumers as much as decoding half a block."""
    return 1 if tactic.span == 1 else 2


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
    x = call.to_e4m3(call.x, "x", turned=True, beside=True)  # beside the sort, which it does not read
    _product(call, 1, x, call.s["act"])
    _product(call, 2, call.to_e4m3(call.s["act"], "act", turned=True), call.s["partial"])
    call.sum_pairs()


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    from moestro.kernels.triton.device import fp8_registers as kernels

    tile, pairs = call.tactic.of_stage(stage)
    groups, each = tile.warps // 4, programs(tile.warps)
    consumer, producer = registers(tile, pairs, call.tactic.overlap_steps, call.tactic.span)
    part = part_of(pairs)
    width, extra = path.parts(pairs)
    weights = call.packed(stage)
    assert isinstance(weights, TritonFP4)
    codes, scales = boxes_of_weights(weights, tile.rows)
    if stage == 1:  # gathers
        x_desc = piece = codes
    else:
        x_desc, piece = descriptor(x.data, width), descriptor(x.data, min(width // 2, extra or width))
    routing, stride = call.routing(stage)
    narrow = narrow_code(kernels, call.tactic.narrow)
    grid = kernels.Grid(tile.rows, width, extra, groups, tile.k_blocks, tile.stages,
                        call.tactic.raster_group, narrow, call.tactic.overlap_steps, consumer, producer, part,
                        call.tactic.span, step_of(call.tactic))  # fmt: skip
    call.add(
        kernels.fp4_fp8_registers, (call.processors * each,), x, x_desc, piece, routing, stride,
        call.weights_of(stage), codes, scales, out, call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=4,
        maxnreg=most_registers(groups + 1, each),
    )  # fmt: skip

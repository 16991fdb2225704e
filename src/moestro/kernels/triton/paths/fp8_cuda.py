"""4-bit weights and e4m3 activations in CUDA C++ (device/fp8_cuda.cu), decoded in registers: one tactic is one tile.

Few pairs are gathered by the first product's producer, from x that is quantised once per token; of wide tiles x is by
place, which the tensor memory accelerator copies: each token's row is quantised once and written for all its pairs
(device/by_place.cu). The intermediate is quantised once it is whole, since its scale is its row's. Both are written in the
order of columns that the products take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from moestro.errors import BackendError
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.cuda import CudaKernel, Variant, boxes
from moestro.kernels.triton.cuda_source import source
from moestro.kernels.triton.device.arguments import Product, Rows, Size
from moestro.kernels.triton.fp8_layout import COLS, TritonFP4
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.by_place import READ, x_by_place
from moestro.kernels.triton.paths.fp8 import fp8_scratch, unfit_for_fp8
from moestro.kernels.triton.paths.registers import THREADS
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, sizes
from moestro.kernels.triton.words import kernel_rows_of

NAME = "fp8_cuda"
SPAN = 4  # blocks of 128 columns that the tensor core adds itself (device/fp8_cuda.cu)
STEP = 4  # blocks of 64 columns a stage
ROW_BYTES = 72  # codes and scales of a row and 128 columns, at most
WARPS, GROUPS = 8, 2  # that multiply
RESULTS = 8 + WARPS * 256  # bytes at least for results that are turned, and in front of them
CONSUMER, PRODUCER = 232, 40  # registers of a thread: 2 * 232 + 40 of the 504 that three groups of 168 have
PROCESSORS, CLOCK, COPIES = 132, 1.7e9, 2e13  # of estimates: Hz, bytes/s
COPIED = 16  # bytes of weights at a time
PIECE = 16  # rows of x that a tile of few pairs copies at a time
# Of DeepSeek-V3 and 1024 tokens, tiles of 144 pairs that gather take 8 % longer in the first product than x by place, which
# takes 26 of 471 µs to write, and a layer of theirs 0 to 15 % longer, of four models; tiles of 80 take the same (H200).
WIDE = 96


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int
    stages: int  # of two blocks of 128 columns
    raster: int  # tiles of pairs that walk the strips of rows together
    gathers: bool  # x is by token, not by place
    powers: bool  # scales of weights are powers of two that 32 columns share
    bias: torch.dtype | None


def tactic(pairs: int, rows: int) -> Tactic:
    """A tactic of this path, with one tile for both products, and as many stages as shared memory holds."""
    stages = next(n for n in range(16, 0, -1) if bytes_of(rows, pairs, n) <= SHARED_BYTES)
    tile = Tile(rows, STEP, WARPS, stages)
    return Tactic(NAME, "sorted", pairs, tile, tile)


def bytes_of(rows: int, pairs: int, stages: int) -> int:
    """Shared memory that a tile needs at most: stages, what is told of tiles, barriers, results (fp8_cuda_producer.cuh)."""
    ring = stages * 2 * (pairs * COLS + rows * ROW_BYTES)
    slots = (stages + 1) * (8 * pairs + 4 * rows + 16)
    return int(ring + -(-slots // 8) * 8 + 8 * (3 * stages + 1)) + RESULTS


TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(16, 128),
        tactic(16, 256),
        tactic(32, 128),
        tactic(32, 256),
        tactic(48, 256),
        tactic(64, 256),
        tactic(80, 256),
        tactic(128, 128),
        tactic(144, 128),
        tactic(160, 128),
    ),
}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def widths(pairs: int) -> tuple[int, ...]:
    """The products of a tile, ascending: half of its pairs or a few more, and all. Three widths spill registers."""
    half = -(-pairs // 32) * 16
    return (half, pairs) if half < pairs else (pairs,)


def span(columns: int) -> int:
    """Blocks of 128 columns that the tensor core adds itself, all alike: a second length in a kernel spills registers."""
    blocks = triton.cdiv(columns, 2 * COLS) * 2
    return next(n for n in (SPAN, 6, 2) if blocks % n == 0)


def parts(rows: int) -> int:
    """Strips of 64 rows of each group."""
    return rows // (64 * GROUPS)


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("nvfp4", "mxfp4"))
    if reason is not None:
        return reason
    if problem.batch_invariant:  # another order of columns, and spans of columns that the tensor core adds
        return "its sums are not those of paths 'fp8' and 'fp8_once' bit by bit, which batch-invariant problems keep to"
    for stage in (1, 2):
        tile, pairs = tactic.of_stage(stage)
        if tile.warps != WARPS or tile.rows not in (128, 256) or tile.k_blocks != STEP or tile.stages < 2:
            return f"a tile has 128 or 256 rows, {WARPS} warps, {STEP} blocks of 64 columns a stage, and 2 stages at least"
        if pairs % PIECE or not PIECE <= pairs * parts(tile.rows) <= 160:
            return "a tile has a multiple of 16 pairs, up to 160 of 128 rows or 80 of 256"
        if bytes_of(tile.rows, pairs, tile.stages) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return nvrtc.why_missing()


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """All that there are: what the ring and its tiles do not need turns results."""
    return SHARED_BYTES


def gathers(tactic: Tactic) -> bool:
    """Whether the first product's producer gathers rows of x by token."""
    return tactic.pairs1 < WIDE


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds. A strip of 64 rows and a block of columns take 2 cycles a pair in the tensor core and 66 beside it,
    and products 0.95 of that rate, as measured on an H200; what tiles read from L2 comes on top.
    """
    total = path.launches(tactic) + path.LAUNCH * 2
    each = max(1.0, num_tokens * problem.top_k / problem.num_experts)
    for stage, e in enumerate(path.estimates(problem, tactic, num_tokens), 1):
        tile, width = tactic.of_stage(stage)
        rows, columns = sizes(problem, stage)
        hit = e.weights / (rows * columns)
        tiles, padded = path.expected(each, width, "halves")
        programs = hit * tiles * rows / tile.rows
        memory = e.weights * path.weight_bytes(problem) / path.HBM / min(1.0, programs / PROCESSORS)
        strips = hit * rows / 64 * columns / 128
        products = strips * (2 * padded + 66 * tiles) / (0.95 * PROCESSORS * CLOCK)
        copied = e.weights * tiles * path.weight_bytes(problem) + hit * columns * padded * rows / tile.rows
        total += max(memory, products) + copied / COPIES
    return total


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    pairs = num_tokens * problem.top_k
    if gathers(tactic):
        return fp8_scratch(problem, num_tokens, tactic, num_tokens, whole=True)
    return {**fp8_scratch(problem, num_tokens, tactic, pairs, whole=True), "places": ((pairs,), torch.int32)}


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = True
    call.sort()
    # by token x is quantised beside the sort, which it does not read
    x = (
        call.to_e4m3(call.x, "x", turned=True, beside=True)
        if gathers(call.tactic)
        else x_by_place(call, turned=True)
    )
    _product(call, 1, x, call.s["act"])
    # the second product asks for weights while the first one ends (device/fp8_cuda_producer.cuh)
    act = call.to_e4m3(call.s["act"], "act", turned=True, early=True)
    _product(call, 2, act, call.s["partial"])
    call.sum_pairs()


# --- the products ------------------------------------------------------------------------------------------------------


def shared_constants(how: Product, bias: torch.dtype | None) -> dict[str, int | float | bool | str]:
    """Constants of every product in CUDA C++: its activation (device/ends.cuh), its biases, register shares, memory."""
    read, as_float = READ[bias or torch.float32]
    return {
        "PRODUCT": how.stage,
        "GATED": how.gated,
        "ACT": how.act,
        "ALPHA": float(how.alpha),
        "HAS_LIMIT": how.limit is not None,
        "LIMIT": float(how.limit or 0.0),
        "SHIFT": float(how.shift),
        "HAS_BIAS": bias is not None,
        "BIAS": read,
        "OF_BIAS": as_float,
        "CONSUMER_REGISTERS": CONSUMER,
        "PRODUCER_REGISTERS": PRODUCER,
        "SHARED_BYTES": SHARED_BYTES,
    }


def check_addresses(name: str, *weights: torch.Tensor) -> None:
    """Raises BackendError for weights that cannot be copied COPIED bytes at a time."""
    for part in weights:
        if part.data_ptr() % COPIED:
            raise BackendError(
                f"path {name!r} copies {COPIED} bytes at a time, weights lie at {part.data_ptr():#x}"
            )


def variant(HOW: Product, TILE: Grid, SIZE: Size) -> Variant:
    """The source of a product, and how it is launched."""
    constants = {
        **shared_constants(HOW, TILE.bias),
        "GROUPS": GROUPS,
        "PARTS": parts(TILE.rows),
        "PAIRS": TILE.pairs,
        "WIDTHS": ", ".join(map(str, widths(TILE.pairs))),
        "STAGES": TILE.stages,
        "SPAN": span(SIZE.columns),
        "RASTER": TILE.raster,
        "BLOCKS": triton.cdiv(SIZE.columns, COLS),
        "ROWS": SIZE.rows,
        "ROW_BLOCKS": kernel_rows_of(SIZE.rows, HOW.gated) // 64,
        "OUT_STRIDE": SIZE.out_stride,
        "TOP_K": SIZE.top_k,
        "GATHER": TILE.gathers,
        "POWERS": TILE.powers,
    }
    files = ("tiles.cuh", "fp8_cuda_producer.cuh", "ends.cuh", "fp8_cuda_end.cuh", "fp8_cuda.cu")
    text = source(files, constants, widths(TILE.pairs))
    return Variant(text, THREADS * (GROUPS + 1), SHARED_BYTES)


PRODUCT = CudaKernel(
    "fp4_fp8_cuda",
    (
        *("codes", "scales", "row_scale", "bias", "x", "x_scale", "sorted_pairs", "table"),
        *("out", "stride", "whole", "piece"),
    ),
    variant,
)


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    tile, pairs = call.tactic.of_stage(stage)
    weights = call.packed(stage)
    assert isinstance(weights, TritonFP4)
    check_addresses(NAME, weights.words, weights.scales, weights.row_scale)
    routing, stride = call.routing(stage)
    bias = call.bias(stage)
    grid = Grid(tile.rows, pairs, tile.stages, call.tactic.raster_group, stage == 1 and gathers(call.tactic),
                weights.format == "mxfp4", None if bias is None else bias.dtype)  # fmt: skip
    call.add(
        PRODUCT, (call.processors,), weights.words, weights.scales, weights.row_scale, bias, x.data, x.scale,
        routing.sorted_pairs, routing.table, out, stride, boxes(x.data, (pairs, COLS)), boxes(x.data, (PIECE, COLS)),
        HOW=call.product(stage), TILE=grid, SIZE=call.size(stage),
    )  # fmt: skip

"""FP8 blocks in CUDA C++ (device/fp8_once.cu): e4m3 weights as they lie in memory.

x is quantised once per token, with a scale for each 128 columns, and written by place (device/by_place.cu); the end of
the first product quantises the intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.cuda import CudaKernel, Variant, boxes
from moestro.kernels.triton.cuda_source import source
from moestro.kernels.triton.device.arguments import Product, Rows, Size
from moestro.kernels.triton.fp8_layout import COLS, TritonE4M3
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.paths.by_place import x_by_place
from moestro.kernels.triton.paths.fp8 import fp8_scratch, unfit_for_fp8
from moestro.kernels.triton.paths.fp8_cuda import check_addresses, shared_constants
from moestro.kernels.triton.paths.registers import THREADS
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, sizes
from moestro.kernels.triton.words import kernel_rows_of

NAME = "fp8_once_cuda"
PAIRS, GROUPS, WEIGHT_ROWS, HALF = 128, 2, 256, 128
CLUSTERS = {  # (pairs, rows) of a tile -> programs that share it: each has a strip of rows, and half of x for both
    (PAIRS, WEIGHT_ROWS): 1,
    (PAIRS, 2 * WEIGHT_ROWS): 2,
}
FILES = ("tiles.cuh", "ends.cuh", "fp8_once_producer.cuh", "fp8_once_end.cuh", "fp8_once.cu")
STAGES, SLOTS = 4, 2
LEAST_STAGES = 3
# Experts from which tiles are in their order, and an expert's last, which is not full, finds its weights in L2: with Qwen3's
# 128 a layer takes 3.6 % less time at 4096 tokens, 1.2 % at 16384, 4.3 % of 1024 that Zipf routes, and 1.6 % more of 1024
# uniform ones; with DeepSeek-V3's 32 -1.3 to 3 % more, with Mixtral's 8 1.5 to 8 % (H200, results/h200-fp8-order.json).
MANY_EXPERTS = 64
RESULTS = 16384  # bytes for results that are turned
FOUR = 4  # scales that are copied together: 16 bytes, of which a row has a multiple


class Grid(NamedTuple):
    """Constants of a tile, of a program or of two (CLUSTERS)."""

    pairs: int
    rows: int
    stages: int  # of 128 columns
    raster: int  # tiles of pairs that walk the strips of rows together
    bias: torch.dtype | None


def stages_for(stages: int, columns: int) -> int:
    """As many that few blocks of columns are left out of whole rounds: two and more of a gated product take registers that
    there are not, and some are kept in memory (11, 14 or 23 blocks).
    """
    blocks = -(-columns // COLS)
    return min(range(stages, LEAST_STAGES - 1, -1), key=lambda s: blocks % s, default=stages)


def bytes_of(stages: int, columns: int) -> int:
    """Shared memory of a tile: stages, what is told of tiles, barriers, results (device/fp8_once.cu)."""
    blocks = -(-columns // COLS)
    told = 4 * PAIRS + 8 * blocks + 16
    ring = stages * ((PAIRS + WEIGHT_ROWS) * COLS + PAIRS * FOUR * 4)
    used = ring + SLOTS * -(-told // 16) * 16 + 8 * (2 * stages + SLOTS)
    return -(-used // COLS) * COLS + RESULTS


def tactic(pairs: int, rows: int) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    tile = Tile(rows, 2, 8, STAGES)
    return Tactic(NAME, "sorted", pairs, tile, tile)


TABLE: Mapping[str, tuple[Tactic, ...]] = {"fp8": tuple(tactic(*tile) for tile in CLUSTERS)}


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    reason = unfit_for_fp8(problem, tactic, ("fp8_block",))
    if reason is not None:
        return reason
    if problem.batch_invariant:
        return "its sums are not those of path 'fp8_once' bit by bit, which batch-invariant problems keep to"
    if problem.activation.gated and problem.intermediate_size % COLS:
        return f"gate and up of FP8 blocks must each be whole blocks of {COLS} rows"
    for stage in (1, 2):
        tile, pairs = tactic.of_stage(stage)
        if (pairs, tile.rows) not in CLUSTERS or (tile.k_blocks, tile.warps) != (2, 8) or tile.stages < 2:
            known = ", ".join(f"{p} x {r}" for p, r in CLUSTERS)
            return f"a tile has {known} pairs and rows, 8 warps, 2 blocks of 64 columns a stage, 2 stages at least"
        if shared_bytes(problem, tactic, stage) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return nvrtc.why_missing()


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the ring, and what is beside it."""
    return bytes_of(tactic.of_stage(stage)[0].stages, sizes(problem, stage)[1])


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: products at 1.7 times bf16's rate."""
    each = path.estimates(problem, tactic, num_tokens)
    total = path.launches(tactic) + 2 * path.LAUNCH
    return total + sum(max(e.weights / path.HBM, e.products / 1.7) for e in each)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    """Rows are whole blocks of columns, scales float32 [places, blocks], a multiple of FOUR."""
    p, pairs = problem, num_tokens * problem.top_k
    plan = dict(fp8_scratch(p, num_tokens, tactic, pairs, blocks=True, whole=True))
    plan["places"] = ((pairs,), torch.int32)
    for name, columns in (("x", p.hidden_size), ("act", p.intermediate_size)):
        plan[f"{name}_scale"] = ((pairs, triton.cdiv(columns, FOUR * COLS) * FOUR), torch.float32)
    del plan["act"]
    return plan


def launch(call: Call) -> None:
    call.weighted = False  # the sum does it
    call.by_size = call.p.num_local_experts < MANY_EXPERTS
    call.sort()
    act = Rows(call.s["act_values"], call.s["act_scale"])
    _product(call, 1, x_by_place(call, blocks=True), act)
    _product(call, 2, act, Rows(call.s["partial"], None))
    call.sum_pairs()


# --- the products ------------------------------------------------------------------------------------------------------


def variant(HOW: Product, TILE: Grid, SIZE: Size) -> Variant:
    """The source of a product, and how it is launched."""
    cluster = CLUSTERS[TILE.pairs, TILE.rows]
    constants = {
        **shared_constants(HOW, TILE.bias),
        "CLUSTER": cluster,
        "STAGES": TILE.stages,
        "RASTER": TILE.raster,
        "BLOCKS": triton.cdiv(SIZE.columns, COLS),
        "ROWS": SIZE.rows,
        "KERNEL_ROWS": kernel_rows_of(SIZE.rows, HOW.gated),
        "SCALE_ROWS": triton.cdiv(SIZE.rows, COLS),
        "OUT_STRIDE": SIZE.out_stride,
    }
    text = source(FILES, constants, (HALF,))
    return Variant(text, THREADS * (GROUPS + 1), bytes_of(TILE.stages, SIZE.columns), cluster)


PRODUCT = CudaKernel(
    "fp8_once_cuda",
    (
        "scales",
        "bias",
        "sorted_pairs",
        "table",
        "out",
        "out_scale",
        "stride",
        "out_blocks",
        "x",
        "x_scale",
        "w",
    ),
    variant,
)


def _product(call: Call, stage: int, x: Rows, out: Rows) -> None:
    tile, pairs = call.tactic.of_stage(stage)
    weights, size = call.weights_of(stage), call.size(stage)
    experts = call.experts.gate_up if stage == 1 else call.experts.down
    assert isinstance(experts, TritonE4M3)
    rows = experts.words.view(-1, size.columns)
    check_addresses(NAME, rows)
    cluster = CLUSTERS[pairs, tile.rows]
    programs = max(call.processors // cluster, 1) * cluster
    routing, stride = call.routing(stage)
    grid = Grid(pairs, tile.rows, stages_for(tile.stages, size.columns), call.tactic.raster_group,
                None if weights.bias is None else weights.bias.dtype)  # fmt: skip
    call.add(
        PRODUCT, (programs,), weights.scales, weights.bias, routing.sorted_pairs, routing.table, out.data, out.scale,
        stride, 0 if out.scale is None else out.scale.shape[1], boxes(x.data, (64, COLS)),
        boxes(x.scale, (PAIRS, FOUR), swizzle=0), boxes(rows, (HALF, COLS)), HOW=call.product(stage), TILE=grid,
        SIZE=size._replace(out_stride=out.data.shape[1]),
    )  # fmt: skip

"""MXFP4 and MXFP8 weights with e4m3 activations on block-scaled tensor cores (device/fp8_mx.py): compiled and
interpreted, never run on such a chip by us.

The weights stay in the checkpoint layout and are multiplied as they are. x is quantised once per token, the intermediate
once it is whole, from float32: its scale is its row's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moestro.formats import MXFP4, MXFP8
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.device import fp8_mx as kernels
from moestro.kernels.triton.device.arguments import Rows, Weights
from moestro.kernels.triton.fp8_layout import block_scaled
from moestro.kernels.triton.paths import fused, path
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, sizes

NAME = "fp8_mx"
BYTES = {"mxfp4": 17 / 32, "mxfp8": 33 / 32}  # of a weight
BARRIERS = 64  # bytes, at most


def tactic(pairs: int, tile: Tile) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile)


# Estimates, not measurements: 128 rows are what the tensor core takes at once, the pairs' width follows the
# pairs that an expert has.
TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "fp8": (
        tactic(16, Tile(128, 4, 4, 5)),
        tactic(32, Tile(128, 4, 4, 5)),
        tactic(64, Tile(128, 4, 4, 5)),
        tactic(128, Tile(128, 4, 8, 4)),
        tactic(256, Tile(128, 4, 8, 3)),
    ),
}
INVARIANT = TABLE["fp8"][2]


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """The width that holds the pairs of an average expert."""
    if problem.batch_invariant:
        return INVARIANT
    return path.holding(TABLE["fp8"], problem, num_tokens)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if not block_scaled(problem):
        return (
            "path 'fp8_mx' needs block-scaled tensor cores (compute capability 10.0 or 10.3), weights of "
            f"{' or '.join(BYTES)}, and e4m3 activations (input_format='fp8')"
        )
    if tactic.route != "sorted" or tactic.split_k != 1 or tactic.narrow:
        return "path 'fp8_mx' takes sorted pairs, whole columns, and tiles of one width"
    if problem.batch_invariant and tactic != INVARIANT:
        return f"whether its tiles sum alike was never seen: batch-invariant problems keep to {INVARIANT}"
    if any(shared_bytes(problem, tactic, stage) > SHARED_BYTES for stage in (1, 2)):
        return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the pipeline buffers of a product, where e2m1 takes a byte, too."""
    tile, width = tactic.of_stage(stage)
    step = 64 * tile.k_blocks
    return ((tile.rows + width) * step + tile.rows * step // 32) * (tile.stages - 1) + BARRIERS


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds, of bytes and of products at twice bf16's rate."""
    estimates = path.estimates(problem, tactic, num_tokens)
    bytes_over = BYTES[problem.weight_format] / path.weight_bytes(problem)
    products = sum(max(e.memory * bytes_over, e.products / 2) for e in estimates)
    return path.launches(tactic) + 2 * path.LAUNCH + products


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    plan = dict(calls.scratch(problem, num_tokens, tactic, num_tokens))
    for name in ("x_values", "act_values"):
        plan[name] = (plan[name][0], torch.float8_e4m3fn)
    return plan


def launch(call: Call) -> None:
    call.sort()
    _product(call, 1, call.to_e4m3(call.x, "x"), call.s["act"])
    _product(call, 2, call.to_e4m3(call.s["act"], "act"), call.s["partial"])
    call.sum_pairs()


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    columns = sizes(call.p, stage)[1]
    tile, width = call.tactic.of_stage(stage)
    step = 64 * tile.k_blocks
    q = call.experts.gate_up if stage == 1 else call.experts.down
    assert isinstance(q, MXFP4 | MXFP8)
    data, codes = (q.packed, 2) if isinstance(q, MXFP4) else (q.data, 1)
    slots, how = fused.schedule(call, stage)
    programs = slots * fused.strips(call, stage)
    grid = kernels.Grid(tile.rows, width, step, tile.stages, how.group, columns % step == 0, codes)
    routing, stride = call.routing(stage)
    call.add(
        kernels.mx_gemm, (programs,), x, routing, stride, slots, Weights(data, q.scale, None, call.bias(stage)),
        out, call.size(stage), HOW=call.product(stage)._replace(by_pair=False), TILE=grid, num_warps=tile.warps,
    )  # fmt: skip

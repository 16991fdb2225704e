"""W4A4 on FP4 tensor cores (device/fp4.py): compiled and interpreted, never run on such a chip by us.

The weights stay in the checkpoint layout, and every value between the kernels is packed: x is quantised once
per token (or per pair, where the checkpoint gives each expert its own scale), the intermediate once per pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import multiplies_fp4
from moestro.kernels.triton.device import decode
from moestro.kernels.triton.device import fp4 as kernels
from moestro.kernels.triton.device.arguments import Rows, Weights
from moestro.kernels.triton.paths import fused, path
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, sizes

NAME = "fp4"


def tactic(pairs: int, tile: Tile) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile)


# Estimates, not measurements: 128 rows are what the tensor core takes at once, the pairs' width follows the
# pairs that an expert has.
TABLE: Mapping[str, tuple[Tactic, ...]] = {
    "nvfp4": (
        tactic(16, Tile(128, 4, 4, 4)),
        tactic(32, Tile(128, 4, 4, 4)),
        tactic(64, Tile(128, 4, 4, 4)),
        tactic(128, Tile(128, 4, 8, 3)),
        tactic(256, Tile(128, 4, 8, 3)),
    ),
}


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """The width that holds the pairs of an average expert."""
    return path.holding(TABLE["nvfp4"], problem, num_tokens)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if not multiplies_fp4(problem):
        return "path 'fp4' needs FP4 tensor cores, and weights and activations in NVFP4"
    if tactic.route != "sorted" or tactic.split_k != 1 or tactic.narrow:
        return "path 'fp4' takes sorted pairs, whole columns, and tiles of one width"
    if any(shared_bytes(problem, tactic, stage) > SHARED_BYTES for stage in (1, 2)):
        return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the pipeline buffers of a product."""
    tile, width = tactic.of_stage(stage)
    return (tile.rows + width) * tile.k_blocks * 36 * tile.stages


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds, of bytes and of products at four times bf16's rate."""
    products = path.estimates(problem, tactic, num_tokens)
    return path.launches(tactic) + sum(max(e.memory, e.products / 4) for e in products)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    plan = dict(calls.scratch(problem, num_tokens, tactic, x_rows))
    for name, columns in (("x", problem.hidden_size), ("act", problem.intermediate_size)):
        rows = plan[f"{name}_values"][0][0]
        plan[f"{name}_values"] = ((rows, columns // 2), torch.uint8)
        plan[f"{name}_blocks"] = ((rows, columns // 16), torch.float8_e4m3fn)
    return plan


def launch(call: Call) -> None:
    call.sort()
    _product(call, 1, _inputs(call), call.s["act"])
    _product(call, 2, call.intermediate(), call.s["partial"])
    call.sum_pairs()


def _inputs(call: Call) -> Rows:
    """Rows that come quantised are read as they are."""
    if not call.x_quantized:
        return call.inputs()
    call.s["x_blocks"], global_scale = call.x_quantized
    return Rows(call.x, call.per_token(global_scale))


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    columns = sizes(call.p, stage)[1]
    tile, width = call.tactic.of_stage(stage)
    step = 64 * tile.k_blocks
    q: Any = call.experts.gate_up if stage == 1 else call.experts.down
    weights = Weights(q.packed, q.scale, q.global_scale, call.bias(stage))
    slots, how = fused.schedule(call, stage)
    programs = slots * fused.strips(call, stage)
    grid = kernels.Grid(tile.rows, width, step, tile.stages, how.group, columns % step == 0)
    product = call.product(stage)._replace(format=decode.NVFP4.value)
    routing, stride = call.routing(stage)
    call.add(
        kernels.scaled_gemm, (programs,), x, call.s["x_blocks" if stage == 1 else "act_blocks"], routing,
        stride, slots, weights, q.global_scale[0].numel(), out, call.size(stage), HOW=product, TILE=grid,
        num_warps=tile.warps,
    )  # fmt: skip

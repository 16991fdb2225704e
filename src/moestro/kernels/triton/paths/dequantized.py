"""Weights dequantised once to memory, then a bf16 product; dense weights take the same product (device/dequantized.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.chip import multiplies_fp4
from moestro.kernels.triton.device import dequantized as kernels
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.layout import PACKED, Packed
from moestro.kernels.triton.paths import path
from moestro.kernels.triton.tactic import SHARED_BYTES, Tactic, Tile, gated, num_slots, sizes
from moestro.kernels.triton.words import kernel_rows_of

NAME = "dequantized"


def tactic(pairs: int, tile: Tile) -> Tactic:
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, "sorted", pairs, tile, tile)


LARGE = tactic(128, Tile(256, 1, 8, 4))
TABLE: Mapping[str, tuple[Tactic, ...]] = dict.fromkeys(("packed", "dense", "nvfp4", "rounded"), (LARGE,))


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    return tactic


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if multiplies_fp4(problem):
        return "weights stay as the checkpoint has them for FP4 tensor cores, which are another path's"
    if tactic.route != "sorted" or tactic.split_k != 1 or tactic.narrow:
        return "the dequantized path takes sorted pairs, whole columns, and tiles of one width"
    if problem.hidden_size % 8 or problem.intermediate_size % 8:
        return "the tensor memory accelerator needs rows of a multiple of 16 bytes"
    if any(shared_bytes(problem, tactic, stage) > SHARED_BYTES for stage in (1, 2)):
        return "its tiles exceed shared memory"
    return None


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Of the pipeline buffers of a product."""
    tile, width = tactic.of_stage(stage)
    return (width + tile.rows) * tile.k_blocks * 64 * 2 * tile.stages


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds: dequantised weights are written and read once more."""
    packed = problem.weight_format in PACKED
    total = path.launches(tactic)
    for e in path.estimates(problem, tactic, num_tokens):
        total += e.memory + (e.weights * 2.6 / path.HBM if packed else 0.0) + e.products / 1.1
    return total


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    plan = dict(calls.scratch(problem, num_tokens, tactic, x_rows))
    if problem.weight_format in PACKED:
        size = max(
            kernel_rows_of(rows, gated(problem, stage)) * columns
            for stage in (1, 2)
            for rows, columns in (sizes(problem, stage),)
        )
        plan["dense"] = ((problem.num_local_experts * size,), torch.bfloat16)
    return plan


def launch(call: Call) -> None:
    call.two_products(_product)


def _product(call: Call, stage: int, x: Rows, out: torch.Tensor) -> None:
    rows, columns = sizes(call.p, stage)
    tile, pairs = call.tactic.of_stage(stage)
    step, packed = 64 * tile.k_blocks, call.packed(stage)
    weights, halves = call.weights_of(stage), packed is None and gated(call.p, stage)
    if packed is None:
        padded, flat = rows, weights.data.view(-1, columns)
    else:
        padded = kernel_rows_of(rows, gated(call.p, stage))
        flat = _expanded(call, packed, padded, columns)
    w_desc = TensorDescriptor.from_tensor(flat, [tile.rows // 2 if halves else tile.rows, step])
    gather = stage == 1
    x_desc = w_desc if gather else TensorDescriptor.from_tensor(x.data, [pairs, step])
    group = call.tactic.raster_group
    tiles = triton.cdiv(num_slots(call.p, call.pairs, pairs), group) * group * triton.cdiv(rows, tile.rows)
    grid = kernels.Grid(pairs, tile.rows, step, tile.stages, group, gather)
    routing, stride = call.routing(stage)
    call.add(
        kernels.dense_gemm, (tiles,), x, x_desc, w_desc, routing, stride, weights, padded, out,
        call.size(stage), HOW=call.product(stage), TILE=grid, num_warps=tile.warps,
    )  # fmt: skip


def _expanded(call: Call, weights: Packed, padded: int, columns: int) -> torch.Tensor:
    """Weights to bfloat16 [L * padded, columns]; both products use the same memory in turn."""
    strips, blocks = call.p.num_local_experts * padded // 64, triton.cdiv(columns, 64)
    flat = call.s["dense"][: strips * 64 * columns].view(-1, columns)
    args = (weights.words, weights.scales, flat, blocks, columns)
    call.add(kernels.expand, (strips, triton.cdiv(blocks, 4)), *args, FORMAT=weights.CODE,
             SCALE_ROWS=weights.SCALE_ROWS, EVEN=columns % 64 == 0, COLS=4)  # fmt: skip
    return flat

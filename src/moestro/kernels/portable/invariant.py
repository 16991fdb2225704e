"""Batch-invariant products: a row's bits depend on nothing but its own values, whatever N and the other rows.

A matrix product of PyTorch may sum in another order for another number of rows, and its elementwise functions may
take another path at the end of a tensor. So rows go through products of one fixed shape, padded with zeros in a
buffer at one place; functions are built of arithmetic that rounds correctly, alike in vectors and in scalars; and a
token's experts are added one after the other, in order of their ids.

That a row's place within such a block does not matter is true of every product that was tried, and promised by
nobody: `rows_of_block` tries it once for each shape, and where it fails rows go one by one.
"""

from __future__ import annotations

import functools
import logging

import torch

from moestro.kernels.portable.stages import Call, compute_dtype, expert_of, finish, scatter_add, sort_pairs
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan, carve

ROWS = 16  # of a block: one tile of AMX or of a tensor core
SLAB = 1024  # rows of an expert between its two products

log = logging.getLogger(__name__)


def blocks_plan(problem: MoeProblem, num_tokens: int) -> Plan:
    """What `run_blocks` works in."""
    p, dtype = problem, compute_dtype(problem)
    weight: Plan = {} if p.weight_dtype == dtype else {"w": ((p.gate_up_rows * p.hidden_size,), dtype)}
    return {
        **weight,
        "acc": ((num_tokens, p.hidden_size), torch.float32),
        "x": ((ROWS, p.hidden_size), dtype),
        "h": ((ROWS, p.gate_up_rows), dtype),
        "slab": ((min(SLAB, num_tokens * p.top_k), p.intermediate_size), dtype),
        "a": ((ROWS, p.intermediate_size), dtype),
        "y": ((ROWS, p.hidden_size), dtype),
    }


def run_blocks(call: Call, workspace: torch.Tensor | None) -> torch.Tensor:
    """Expert after expert, its pairs a slab at a time: gate_up of all blocks, then down of all blocks."""
    p = call.problem
    bufs = carve(blocks_plan(p, len(call.x)), workspace, call.x.device)
    acc = bufs["acc"].zero_()
    groups = sort_pairs(call)
    for expert, begin, end in groups.on_host(p.num_local_experts):
        for first in range(begin, end, SLAB):
            at = slice(first, min(first + SLAB, end))
            token, weight = groups.token[at], groups.weight[at]
            _gate_up(call, expert, token, bufs)
            _down(call, expert, token, weight, bufs)
    return finish(call, acc)


def _gate_up(call: Call, expert: int, token: torch.Tensor, bufs: dict[str, torch.Tensor]) -> None:
    """bufs["slab"][:M] = activation(gate_up · x) of an expert's M rows."""
    w, x, h = call.experts, bufs["x"], bufs["h"]
    matrix = expert_of(w.gate_up, expert, call.dtype, bufs.get("w")).T
    bias = None if w.gate_up_bias is None else w.gate_up_bias[expert]
    size = _rows(x, h)
    for first in range(0, len(token), size):
        at = slice(first, first + size)
        given = call.rows(token[at], expert)
        x[: len(given)].copy_(given)
        _product(x, len(given), size, matrix, h)
        bufs["slab"][at][: len(given)].copy_(call.activate(h[: len(given)], bias, expert))


def _down(
    call: Call,
    expert: int,
    token: torch.Tensor,
    weight: torch.Tensor,
    bufs: dict[str, torch.Tensor],
) -> None:
    """acc[token] += weight · (down · slab + bias)."""
    w, a, y = call.experts, bufs["a"], bufs["y"]
    matrix = expert_of(w.down, expert, call.dtype, bufs.get("w")).T
    size = _rows(a, y)
    for first in range(0, len(token), size):
        tokens = token[first : first + size]
        a[: len(tokens)].copy_(bufs["slab"][first : first + len(tokens)])
        _product(a, len(tokens), size, matrix, y)
        rows = y[: len(tokens)].float()
        if w.down_bias is not None:
            rows = rows + w.down_bias[expert]
        rows = rows * weight[first : first + size]
        scatter_add(bufs["acc"], tokens, rows, deterministic=True)


def _rows(given: torch.Tensor, result: torch.Tensor) -> int:
    return rows_of_block(given.device, given.dtype, given.shape[1], result.shape[1], torch.get_num_threads())


def _product(given: torch.Tensor, rows: int, size: int, matrix: torch.Tensor, out: torch.Tensor) -> None:
    """out[:size] = given[:size] @ matrix, rows beyond `rows` being zeros."""
    given[rows:size].zero_()
    torch.mm(given[:size], matrix, out=out[:size])


@functools.cache
def rows_of_block(device: torch.device, dtype: torch.dtype, columns: int, results: int, threads: int) -> int:
    """ROWS where each place of a block [ROWS, columns] gives a row the same bits, whatever is in the others; else 1."""
    generator = torch.Generator("cpu").manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    row, matrix = some(columns), some(results, columns).T
    blocks = [some(ROWS, columns) for _ in range(ROWS)]
    blocks.append(torch.zeros_like(blocks[0]))  # the last: beside zeros
    found = []
    for place, block in enumerate(blocks):
        block[place % ROWS] = row
        found.append(torch.mm(block, matrix)[place % ROWS])
    if all(torch.equal(found[0], other) for other in found):
        return ROWS
    log.warning(
        "batch_invariant: the product [%d, %d] x [%d, %d] in %s on %s depends on a row's place; rows go one by one",
        ROWS, columns, columns, results, dtype, device,
    )  # fmt: skip
    return 1

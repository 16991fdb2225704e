"""The fused products of few tokens in one launch (device/chain.py)."""

from __future__ import annotations

from collections.abc import Mapping

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import call as calls
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.device import chain as kernels
from moestro.kernels.triton.device.arguments import Both
from moestro.kernels.triton.device.chain import Chain
from moestro.kernels.triton.paths import fused
from moestro.kernels.triton.tactic import Tactic, Tile, num_slots

NAME = "chain"
SLOTS = 1024  # tiles of pairs that a chain can count


def tactic(pairs: int, tile: Tile, route: str = "sorted", narrow: str = "", split_k: int = 1,
           prefetch_kib: int = 0) -> Tactic:  # fmt: skip
    """A tactic of this path, with one tile for both products."""
    return Tactic(NAME, route, pairs, tile, tile, narrow, split_k=split_k, prefetch_kib=prefetch_kib)


TABLE: Mapping[str, tuple[Tactic, ...]] = {  # see fused.TABLE
    "packed": (
        tactic(8, Tile(32, 4, 2, 4), "direct", split_k=4, prefetch_kib=16),
        tactic(8, Tile(64, 2, 4, 4), "direct"),
        tactic(8, Tile(64, 2, 4, 6), "direct"),
        tactic(8, Tile(64, 4, 4, 4), "direct"),
        tactic(8, Tile(64, 2, 4, 4), "direct", split_k=8),
        tactic(8, Tile(64, 2, 4, 6), "direct", split_k=4),
        tactic(8, Tile(64, 2, 4, 8), "direct", split_k=4),
        tactic(8, Tile(128, 2, 4, 5), "direct", split_k=4),
        tactic(8, Tile(128, 2, 4, 3), "direct", split_k=8),
        tactic(8, Tile(64, 2, 4, 4)),
        tactic(8, Tile(64, 2, 4, 6)),
        tactic(8, Tile(32, 4, 2, 4), split_k=2),
        tactic(8, Tile(128, 2, 4, 3)),
        tactic(8, Tile(128, 2, 4, 5)),
        tactic(16, Tile(128, 2, 4, 3)),
        tactic(32, Tile(128, 2, 4, 3)),
        tactic(32, Tile(128, 2, 4, 3), split_k=2),
        tactic(64, Tile(128, 2, 4, 3), narrow="quarters"),
        tactic(64, Tile(128, 2, 4, 3), narrow="quarters", split_k=2),
    ),
    "dense": (
        tactic(8, Tile(64, 2, 4, 4), "direct"),
        tactic(8, Tile(64, 2, 4, 6)),
        tactic(8, Tile(128, 2, 4, 5)),
        tactic(16, Tile(128, 2, 4, 3)),
        tactic(64, Tile(128, 2, 4, 3), narrow="quarters"),
    ),
}
fitted = fused.fitted
shared_bytes = fused.shared_bytes


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic of this path cannot run a problem."""
    if problem.input_format is not None:
        return "a chain has no place for quantising activations between its products"
    if tactic.widths[0] != tactic.widths[1]:
        return "a chain has one width"
    if tactic.gemm1.warps != tactic.gemm2.warps:
        return "the tiles of a chain have the same number of warps"
    pairs = num_tokens * problem.top_k
    slots = pairs if tactic.route == "direct" else num_slots(problem, pairs, tactic.pairs1)
    if slots + tactic.raster_group > SLOTS:
        return f"a chain counts at most {SLOTS} tiles"
    return fused.why_not(problem, tactic, num_tokens)


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds, as fused.cost but for a launch less."""
    return fused.cost(problem, tactic, num_tokens)


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    return calls.scratch(problem, num_tokens, tactic, x_rows)


def launch(call: Call) -> None:
    call.sort()
    rows = call.inputs()
    routing, stride = call.routing(1)
    slots, tile1 = fused.schedule(call, 1)
    strips = fused.strips(call, 1), fused.strips(call, 2)
    how = Chain(call.product(1), call.product(2), tile1, fused.schedule(call, 2)[1], *strips, kernels.LINE)  # fmt: skip
    call.add(
        kernels.moe_chain, (slots * sum(strips),), rows, routing, stride, call.pairs, slots,
        Both(call.weights_of(1), call.weights_of(2)), Both(call.s["act"], call.s["partial"]), call.s["done"],
        call.size(1), HOW=how, num_warps=call.tactic.gemm1.warps,
    )  # fmt: skip
    call.sum_pairs(call.s["done"], slots)

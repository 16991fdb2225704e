"""What a path offers, and the estimate that orders tactics: a roofline of bytes, products and decoding.

Estimates are used for nothing but the order in which candidates are tried, and to leave out hopeless ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton.call import Call
from moestro.kernels.triton.fp8_layout import packed_type, rounded_to_fp8
from moestro.kernels.triton.tactic import Tactic, sizes

HBM, TENSOR, INSTRUCTIONS, LAUNCH = 2.7e12, 6.5e14, 2.0e13, 3e-6  # bytes/s, FLOP/s, lane instructions/s, s
L2 = 1.0e13  # bytes/s, of which dense products of 128 x 256 have taken 7.5e12
SPREAD = (-1.4, -0.9, -0.5, -0.2, 0.2, 0.5, 0.9, 1.4)  # standard deviations: the middles of eight equal parts

LONG_WALK, LONG_WALK_PAIRS = (
    16,
    1000.0,
)  # a raster group, and the pairs per expert from which it is worth a race


class Path(Protocol):
    """A way to multiply; see the package."""

    NAME: str
    TABLE: Mapping[str, tuple[Tactic, ...]]

    def fitted(self, problem: MoeProblem, tactic: Tactic) -> Tactic: ...

    def why_not(self, problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None: ...

    def shared_bytes(self, problem: MoeProblem, tactic: Tactic, stage: int) -> int: ...

    def cost(self, problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float: ...

    def scratch(self, problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan: ...

    def launch(self, call: Call) -> None: ...


def kind_of(problem: MoeProblem) -> str:
    """Which rows of a path's TABLE are for a problem."""
    if rounded_to_fp8(problem):
        return "rounded"
    return problem.input_format or ("dense" if problem.weight_format == "bf16" else "packed")


def weight_bytes(problem: MoeProblem) -> float:
    """Of one weight in memory."""
    packed = packed_type(problem)
    return 2.0 if packed is None else packed.bytes_per_weight()


def parts(width: int) -> tuple[int, int]:
    """A tile's pairs as a power of two, and what is over: operands are powers of two wide."""
    most = 1 << width.bit_length() - 1
    return most, width - most


def walk(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """What an estimate is multiplied by: a walk as long as LONG_WALK is another order of the same bytes and products,
    and not raced where an expert's pairs do not fill it. On an H200 it took 0.96 to 1.07 of the time of 8 tiles at 1024
    and 4096 pairs per expert, and the same at 256.
    """
    per_expert = num_tokens * problem.top_k / problem.num_experts
    return 2.0 if tactic.raster_group >= LONG_WALK and per_expert < LONG_WALK_PAIRS else 1.0


def holding(table: Sequence[Tactic], problem: MoeProblem, num_tokens: int) -> Tactic:
    """The first tactic, of ascending widths, that holds the pairs of an average expert; else the last."""
    each = num_tokens * problem.top_k / problem.num_experts
    return next((t for t in table if t.pairs1 >= each), table[-1])


class Estimate(NamedTuple):
    """Seconds of one product."""

    weights: float  # of the experts that are hit
    memory: float
    products: float
    decoding: float
    operands: float  # of dense weights: both operands of every tile, through the L2 cache


def launches(tactic: Tactic) -> float:
    """Seconds of everything but the products."""
    return LAUNCH * (3 + (tactic.route == "sorted") - (tactic.path == "chain"))


def estimates(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> Iterator[Estimate]:
    """Of both products. Tokens are taken to draw their experts at random, all alike."""
    p, pairs = problem, num_tokens * problem.top_k
    hit = p.num_local_experts * (1 - (1 - 1 / p.num_experts) ** pairs)
    each = pairs / p.num_experts * p.num_local_experts / hit  # pairs of an expert that is hit
    packed = packed_type(p)
    instructions = 0.0 if packed is None else packed.INSTRUCTIONS
    for stage in (1, 2):
        rows, columns = sizes(p, stage)
        tile, width = tactic.of_stage(stage)
        weights = hit * rows * columns
        tiles, padded = expected(each, width, tactic.narrow)
        programs = hit * tiles * rows / tile.rows * (tactic.split_k if stage == 2 else 1)
        yield Estimate(
            weights,
            memory=weights * weight_bytes(p) / HBM / min(1.0, programs / 264),
            products=2 * rows * columns * hit * padded / TENSOR,
            decoding=weights * tiles * instructions / INSTRUCTIONS,
            operands=0.0 if packed else 2 * (weights * tiles + weights * padded / tile.rows) / L2,
        )


def expected(each: float, width: int, narrow: str) -> tuple[float, float]:
    """(tiles, their columns in all) of an expert that draws `each` pairs on average, as a binomial spreads them."""
    tiles = columns = 0.0
    pieces = {"": 1, "halves": 2, "quarters": 4}[narrow]
    for z in SPREAD:
        count = max(1.0, each + z * math.sqrt(each))
        full = math.ceil(count / width) - 1
        step = parts(width)[0] / pieces
        last = min(width, math.ceil((count - full * width) / step) * step)
        tiles += (full + 1) / len(SPREAD)
        columns += (full * width + last) / len(SPREAD)
    return tiles, columns

"""The settings of the Triton kernels, which of them are valid, and in which order they are worth trying.

`TABLE` is literal; `unfit` is the single statement of the constraints; `cost` is a roofline estimate used only to
order candidates (the tuner measures them).
"""

from __future__ import annotations

from dataclasses import dataclass

from moestro.kernels.problem import MoeProblem

SHARED_BYTES = 232_448  # of a program on sm_90
DIRECT_PAIRS = 64  # beyond this, sorting costs less than every program finding its own pairs
MAX_PAIRS = 1 << 22


@dataclass(frozen=True)
class Tactic:
    """One setting. A tile is (rows of weights, blocks of 64 columns per step, warps, pipeline stages).

    path "fused": weights decoded in the registers that feed the tensor core; "dense": dequantised once to
    memory, then a bf16 product. tokens: pairs of one expert in a tile.
    """

    path: str  # "fused" | "dense"
    route: str  # "direct" (every program finds its pairs) | "sorted"
    combine: str  # "reduce" (deterministic) | "atomic"
    tokens: int
    first: tuple[int, int, int, int]
    second: tuple[int, int, int, int]
    persistent: int = 0

    @property
    def tiles(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        return self.first, self.second


def fused(route: str, tokens: int, first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> Tactic:
    return Tactic("fused", route, "reduce", tokens, first, second)


TABLE: tuple[Tactic, ...] = (
    fused("direct", 8, (64, 1, 4, 4), (64, 1, 4, 4)),
    fused("sorted", 8, (128, 1, 4, 4), (128, 1, 4, 4)),
    fused("sorted", 16, (128, 1, 4, 4), (128, 1, 4, 4)),
    fused("sorted", 32, (128, 1, 4, 4), (128, 1, 4, 4)),
    fused("sorted", 64, (128, 1, 4, 4), (128, 1, 4, 4)),
    fused("sorted", 128, (128, 1, 8, 4), (128, 1, 8, 4)),
    Tactic("dense", "sorted", "reduce", 128, (256, 1, 8, 3), (256, 1, 8, 3)),
)


def shared_bytes(problem: MoeProblem, tactic: Tactic, tile: tuple[int, int, int, int]) -> int:
    """Shared memory of the pipeline buffers."""
    rows, unroll, _, stages = tile
    if tactic.path == "dense":
        return (tactic.tokens + rows) * unroll * 64 * 2 * stages
    weights = rows * (36 if problem.weight_format == "nvfp4" else 128)
    return (weights + tactic.tokens * 128) * unroll * stages


def unfit(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic cannot run this many tokens of a problem; None if it can."""
    pairs = num_tokens * problem.top_k
    if tactic.route == "direct" and pairs > DIRECT_PAIRS:
        return f"direct routing takes at most {DIRECT_PAIRS} pairs"
    if pairs > MAX_PAIRS:
        return f"more than {MAX_PAIRS} pairs"
    if problem.deterministic and tactic.combine != "reduce":
        return "atomic sums are not repeatable"
    if tactic.path == "dense":
        if tactic.route != "sorted":
            return "the dense path needs sorted pairs"
        if problem.hidden_size % 8 or problem.intermediate_size % 8:
            return "the tensor memory accelerator needs rows of a multiple of 16 bytes"
    else:
        for size, tile in zip((problem.hidden_size, problem.intermediate_size), tactic.tiles, strict=True):
            if -(-size // 64) % tile[1]:
                return f"steps of {tile[1]} blocks do not divide {size} columns"
    if any(shared_bytes(problem, tactic, tile) > SHARED_BYTES for tile in tactic.tiles):
        return "its tiles exceed shared memory"
    return None


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """What runs before anything is tuned: by pairs per expert."""
    pairs = num_tokens * problem.top_k
    if pairs <= DIRECT_PAIRS:
        return TABLE[0]
    per_expert = pairs / min(problem.num_experts, pairs)
    for tactic in TABLE[1:-1]:
        if per_expert * 1.5 <= tactic.tokens:
            return tactic
    dense = TABLE[-1]
    return dense if unfit(problem, dense, num_tokens) is None else TABLE[-2]

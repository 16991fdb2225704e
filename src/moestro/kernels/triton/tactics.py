"""The settings of the Triton kernels, which of them are valid, and in which order they are worth trying.

`TABLE` is literal; `unfit` is the single statement of the constraints; `cost` is a roofline estimate used only to
order candidates (the tuner measures them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moestro.kernels.problem import MoeProblem

SHARED_BYTES = 232_448  # of a program on sm_90
DIRECT_PAIRS = 64  # beyond this, sorting costs less than every program finding its own pairs
MAX_PAIRS = 1 << 22

Tile = tuple[int, int, int, int]


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
    first: Tile
    second: Tile
    ladder: int = 0  # 1: fused tiles that are not full run narrower
    ahead: int = 0  # blocks of weights that a fused program asks L2 for, ahead of its pipeline
    group: int = 8  # tiles of pairs that walk the rows of weights together
    persistent: int = 0  # programs per processor of the dense product; 0: one per tile

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return self.first, self.second


def fused(tokens: int, first: Tile, second: Tile, route: str = "sorted", **rest: int) -> Tactic:
    return Tactic("fused", route, "reduce", tokens, first, second, **rest)


# UNROLL (the second number of a tile) is halved until it divides a problem's blocks.
TABLE: tuple[Tactic, ...] = (
    fused(8, (64, 2, 4, 4), (64, 2, 4, 4), "direct", ahead=8),
    fused(8, (64, 2, 4, 4), (64, 2, 4, 4), ahead=8),
    fused(16, (64, 2, 4, 4), (64, 2, 4, 4)),
    fused(32, (128, 2, 4, 3), (128, 2, 4, 3)),
    fused(32, (128, 2, 4, 3), (128, 2, 4, 3), ladder=1),
    fused(64, (128, 2, 4, 3), (128, 1, 4, 4)),
    fused(128, (256, 1, 8, 4), (128, 1, 4, 4), ladder=1),
    Tactic("dense", "sorted", "reduce", 128, (256, 1, 8, 4), (256, 1, 8, 4)),
)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with steps that divide the problem's columns."""
    if tactic.path == "dense":
        return tactic
    tiles = []
    for size, (rows, unroll, warps, stages) in zip(
        (problem.hidden_size, problem.intermediate_size), tactic.tiles, strict=True
    ):
        while -(-size // 64) % unroll:
            unroll //= 2
        tiles.append((rows, unroll, warps, stages))
    return replace(tactic, first=tiles[0], second=tiles[1])


def candidates(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The tactics that can run this many tokens."""
    found = dict.fromkeys(fitted(problem, t) for t in TABLE)
    return [t for t in found if unfit(problem, t, num_tokens) is None]


def shared_bytes(problem: MoeProblem, tactic: Tactic, tile: Tile) -> int:
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
    if tactic.ladder and (tactic.route != "sorted" or tactic.tokens < 32):
        return "narrower tiles need sorted pairs, and 8 tokens at least in the narrowest"
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
    if pairs <= DIRECT_PAIRS // 2:
        return fitted(problem, TABLE[0])
    per_expert = pairs / min(problem.num_experts, pairs)
    choices = [t for t in candidates(problem, num_tokens) if t.route == "sorted"]
    for tactic in choices:
        if per_expert * 1.25 <= tactic.tokens:
            return tactic
    return choices[-1]

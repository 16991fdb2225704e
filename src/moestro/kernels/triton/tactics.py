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
    tokens2: int = 0  # the same for the second product; 0: as in the first
    split: int = 1  # programs that share the columns of a tile of the second fused product
    together: int = 1  # 0: a step's products wait for each other, in fewer registers (steps of 2 blocks only)
    group: int = 8  # tiles of pairs that walk the rows of weights together
    persistent: int = 0  # programs per processor of the dense product; 0: one per tile

    @property
    def widths(self) -> tuple[int, int]:
        """Pairs in a tile of the first and of the second product."""
        return self.tokens, self.tokens2 or self.tokens

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return self.first, self.second


def fused(tokens: int, first: Tile, second: Tile, route: str = "sorted", **rest: int) -> Tactic:
    return Tactic("fused", route, "reduce", tokens, first, second, **rest)


S, M, B = (64, 2, 4, 4), (128, 2, 4, 3), (128, 1, 8, 4)  # tiles that several tactics share

# UNROLL (the second number of a tile) is halved until it divides a problem's blocks. Which entry wins where was
# measured on an H100 (benchmarks/results/h100-kernels.json).
TABLE: tuple[Tactic, ...] = (
    fused(8, (32, 4, 2, 4), (32, 4, 2, 4), "direct"),
    fused(8, S, S, "direct"),
    fused(8, S, S, "direct", split=4),
    fused(8, M, M, "direct"),
    fused(8, (32, 4, 2, 4), (32, 4, 2, 4)),
    fused(8, S, S),
    fused(8, M, M),
    fused(8, S, S, split=2),
    fused(16, S, S),
    fused(16, S, S, together=0),
    fused(32, S, S),
    fused(32, M, M),
    fused(32, S, S, together=0),
    fused(32, M, M, together=0),
    fused(32, (128, 2, 8, 3), M),
    fused(64, M, (128, 1, 4, 4), ladder=1),
    fused(64, M, M, ladder=1),
    fused(128, B, (256, 1, 8, 4), ladder=1),
    fused(128, B, M, ladder=1, tokens2=64),
    fused(128, (256, 1, 8, 4), M, ladder=1, tokens2=64),
    fused(128, (256, 1, 8, 4), (128, 1, 4, 4)),
    fused(256, B, (128, 2, 8, 3), ladder=1),
    fused(256, B, B, group=16),
    fused(256, B, (256, 1, 8, 4), ladder=1, tokens2=128),
    Tactic("dense", "sorted", "reduce", 128, (256, 1, 8, 4), (256, 1, 8, 4)),
)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with steps that divide the problem's columns."""
    if tactic.path == "dense":
        return tactic
    blocks = -(-problem.hidden_size // 64), -(-problem.intermediate_size // 64)
    split = tactic.split if blocks[1] % tactic.split == 0 else 1
    tiles = []
    for count, (rows, unroll, warps, stages) in zip((blocks[0], blocks[1] // split), tactic.tiles, strict=True):
        while count % unroll:
            unroll //= 2
        tiles.append((rows, unroll, warps, stages))
    together = 1 if min(tiles[0][1], tiles[1][1]) < 2 else tactic.together
    return replace(tactic, first=tiles[0], second=tiles[1], split=split, together=together)


def candidates(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The tactics that can run this many tokens."""
    found = dict.fromkeys(fitted(problem, t) for t in TABLE)
    return [t for t in found if unfit(problem, t, num_tokens) is None]


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Shared memory of the pipeline buffers of the first (0) or second (1) product."""
    rows, unroll, _, stages = tactic.tiles[stage]
    width = tactic.widths[stage]
    if tactic.path == "dense":
        return (width + rows) * unroll * 64 * 2 * stages
    weights = rows * (36 if problem.weight_format == "nvfp4" else 128)
    return (weights + width * 128) * unroll * (stages - 1)


def unfit(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic cannot run this many tokens of a problem; None if it can."""
    pairs = num_tokens * problem.top_k
    if tactic.route == "direct" and pairs > DIRECT_PAIRS:
        return f"direct routing takes at most {DIRECT_PAIRS} pairs"
    if tactic.ladder and (tactic.route != "sorted" or min(tactic.widths) < 64):
        return "narrower tiles need sorted pairs, and 16 tokens at least in the narrowest"
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
        if not tactic.together and min(tactic.first[1], tactic.second[1]) < 2:
            return "steps of one block must not run on into the next"
        steps = (tactic.first[1], tactic.second[1] * tactic.split)
        for size, step in zip((problem.hidden_size, problem.intermediate_size), steps, strict=True):
            if -(-size // 64) % step:
                return f"steps of {step} blocks do not divide {size} columns"
    if any(shared_bytes(problem, tactic, stage) > SHARED_BYTES for stage in (0, 1)):
        return "its tiles exceed shared memory"
    return None


# pairs per expert up to which a width of tiles is the default: (NVFP4, dense bf16), as measured
DEFAULT_WIDTHS = ((8, 5, 4), (16, 8, 12), (32, 24, 24), (64, 48, 0), (128, 100, 0), (256, 2048, 0))


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """What runs before anything is tuned: by pairs per expert."""
    pairs = num_tokens * problem.top_k
    found = candidates(problem, num_tokens)
    if pairs <= min(DIRECT_PAIRS, 2 * problem.num_local_experts) and pairs <= 16:
        return found[1]
    per_expert = pairs / min(problem.num_experts, pairs)
    packed = problem.weight_format == "nvfp4"
    for width, most, most_dense in DEFAULT_WIDTHS:
        fits = [t for t in found if t.path == "fused" and t.route == "sorted" and t.tokens == width]
        if fits and per_expert <= (most if packed else most_dense):
            return fits[1] if width == 8 and len(fits) > 1 else fits[0]
    last = found[-1]
    return last if last.path == "dense" else found[-2]

"""The settings of the Triton kernels, which of them are valid, and in which order they are worth trying.

`TABLE` is literal; `unfit` is the single statement of the constraints; `cost` is a roofline estimate used
only to order candidates (the tuner measures them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import gluon_plan

SHARED_BYTES = 232_448  # of a program on sm_90
DIRECT_PAIRS = 64  # beyond this, sorting costs less than every program finding its own pairs
MAX_PAIRS = 1 << 22
WIDE_EXTRA = 10_240  # shared bytes of a wide product beside its ring
CHAIN_SLOTS = 1024  # tiles of pairs that a chain can count

Tile = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tactic:
    """One setting. A tile is (rows of weights, blocks of 64 columns per step, warps, pipeline stages).

    The blocks per step of a "wide" tile are the stages that its producer fills in one turn.

    path "fused": weights decoded in the registers that feed the tensor core; "chain": so, and both products in
    one launch; "wide": so, and while the tensor cores run (warp_specialized.py); "dense": dequantised once to memory,
    then a bf16 product; "native": FP4 tensor cores (native.py). tokens: pairs of one expert in a tile.
    """

    path: str  # "fused" | "chain" | "dense" | "wide" | "native"
    route: str  # "direct" (every program finds its pairs) | "sorted"
    combine: str  # "reduce" (deterministic) | "atomic"
    tokens: int
    first: Tile
    second: Tile
    ladder: int = 0  # 1: fused and wide tiles that are not full run narrower; 2: wide ones by half only
    tokens2: int = 0  # the same for the second product; 0: as in the first
    split: int = 1  # programs that share the columns of a tile of the second fused product
    together: int = 1  # 0: a step's products wait for each other, in fewer registers (steps of 2 blocks only)
    group: int = 8  # tiles of pairs that walk the rows of weights together
    ahead: int = 0  # KiB of weights that a tile of a chain asks into L2 while it waits
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


def chain(tokens: int, first: Tile, second: Tile, route: str = "sorted", **rest: int) -> Tactic:
    return Tactic("chain", route, "reduce", tokens, first, second, **rest)


def wide(tokens: int, first: Tile, second: Tile, ladder: int = 1, **rest: int) -> Tactic:
    return Tactic("wide", "sorted", "reduce", tokens, first, second, ladder=ladder, **rest)


T, S, M, B = (32, 4, 2, 4), (64, 2, 4, 4), (128, 2, 4, 3), (128, 1, 8, 4)  # tiles that several tactics share
S6, M5 = (64, 2, 4, 6), (128, 2, 4, 5)
WIDE = (256, 1, 8, 4)
# of the wide path: for up to 96, 128 or 144, 192 and 256 or 288 pairs of an expert
SLIM, TALL, EVEN, FLAT = (256, 4, 8, 9), (256, 4, 8, 7), (128, 4, 8, 7), (128, 4, 8, 5)

# What wins somewhere on an H100, or is close, of NVFP4 weights and bf16 activations: of the tactics in
# benchmarks/results/h100-candidates.json, those without which a measured cell would lose more than 1 %.
# UNROLL (the second number of a tile) is halved until it divides a problem's blocks.
TABLE: tuple[Tactic, ...] = (
    fused(8, T, T, "direct"),
    fused(8, S, M, "direct"),
    fused(8, M, M, "direct"),
    fused(8, T, T, "direct", split=4),
    chain(8, T, T, "direct", split=4, ahead=16),
    chain(8, S, S, "direct"),
    chain(8, S6, S6, "direct"),
    chain(8, S, S, "direct", split=8),
    chain(8, M5, M5, "direct", split=4),
    chain(8, S, S),
    chain(8, S6, S6),
    chain(8, T, T, split=2),
    chain(8, M, M),
    chain(8, M5, M5),
    chain(16, M, M),
    chain(32, M, M),
    chain(32, M, M, split=2),
    fused(64, M, M, ladder=1),
    fused(128, B, M, ladder=1, tokens2=64),
    wide(96, SLIM, SLIM, ladder=2),
    wide(128, TALL, TALL),
    wide(144, TALL, TALL, ladder=2),
    wide(192, EVEN, EVEN, ladder=2),
    wide(288, FLAT, FLAT, ladder=2),
    wide(256, FLAT, FLAT, ladder=2),
    wide(256, FLAT, FLAT, ladder=0),
    Tactic("dense", "sorted", "reduce", 128, WIDE, WIDE),
)
# The same for bf16 weights, and for NVFP4 activations, which take neither chains nor wide tiles.
OTHERS: tuple[Tactic, ...] = (
    fused(8, T, T, "direct"),
    fused(8, S, S, "direct"),
    fused(8, S, S, "direct", split=4),
    fused(8, M, M, "direct"),
    fused(16, S, S, "direct"),
    chain(8, S, S, "direct"),
    chain(8, S6, S6),
    chain(8, M5, M5),
    chain(16, M, M),
    chain(64, M, M, ladder=1),
    fused(8, S, S),
    fused(8, T, T),
    fused(8, S, S, split=2),
    fused(16, S, S, together=0),
    fused(32, S, S),
    fused(32, (128, 2, 8, 3), M),
    fused(32, (128, 2, 4, 4), (128, 2, 4, 4)),
    fused(64, M, M, ladder=1),
    fused(128, B, M, ladder=1, tokens2=64),
    fused(128, B, WIDE, ladder=1),
    Tactic("dense", "sorted", "reduce", 128, WIDE, WIDE),
)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with steps that divide the problem's columns."""
    if tactic.path in ("dense", "wide"):
        return tactic
    blocks = -(-problem.hidden_size // 64), -(-problem.intermediate_size // 64)
    split = tactic.split if blocks[1] % tactic.split == 0 else 1
    tiles = []
    for count, (rows, unroll, warps, stages) in zip(
        (blocks[0], blocks[1] // split), tactic.tiles, strict=True
    ):
        while count % unroll:
            unroll //= 2
        tiles.append((rows, unroll, warps, stages))
    together = 1 if min(tiles[0][1], tiles[1][1]) < 2 else tactic.together
    return replace(tactic, first=tiles[0], second=tiles[1], split=split, together=together)


def candidates(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The tactics that can run this many tokens, those estimated to be fast first."""
    table = TABLE if problem.weight_format == "nvfp4" and problem.input_format is None else OTHERS
    found = list(dict.fromkeys(fitted(problem, t) for t in table))
    found = [t for t in found if unfit(problem, t, num_tokens) is None]
    return sorted(found, key=lambda t: cost(problem, t, num_tokens))


def num_slots(problem: MoeProblem, pairs: int, width: int) -> int:
    """An upper bound of the tiles of `width` pairs."""
    return min(pairs, problem.num_local_experts + pairs // width)


def shared_bytes(problem: MoeProblem, tactic: Tactic, stage: int) -> int:
    """Shared memory of the pipeline buffers of the first (0) or second (1) product."""
    rows, unroll, _, stages = tactic.tiles[stage]
    width = tactic.widths[stage]
    if tactic.path == "dense":
        return (width + rows) * unroll * 64 * 2 * stages
    if tactic.path == "wide":  # and barriers, and what turns results
        return (width * 128 + rows * 36 + 16) * stages + WIDE_EXTRA
    weights = rows * (36 if problem.weight_format == "nvfp4" else 128)
    return (weights + width * 128) * unroll * (stages - 1)


def unfit(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic cannot run this many tokens of a problem; None if it can."""
    pairs = num_tokens * problem.top_k
    if tactic.path == "native":
        return "path 'native' needs FP4 tensor cores, and activations in NVFP4"
    if tactic.route == "direct" and pairs > DIRECT_PAIRS:
        return f"direct routing takes at most {DIRECT_PAIRS} pairs"
    if tactic.ladder and (tactic.route != "sorted" or min(tactic.widths) < 64):
        return "narrower tiles need sorted pairs, and 16 tokens at least in the narrowest"
    if pairs > MAX_PAIRS:
        return f"more than {MAX_PAIRS} pairs"
    if problem.deterministic and tactic.combine != "reduce":
        return "atomic sums are not repeatable"
    if tactic.path == "chain":
        if problem.input_format is not None:
            return "a chain has no place for quantising activations between its products"
        if tactic.combine != "reduce" or tactic.widths[0] != tactic.widths[1]:
            return "a chain sums pairs in order, and has one width"
        if tactic.first[2] != tactic.second[2]:
            return "the tiles of a chain have the same number of warps"
        slots = pairs if tactic.route == "direct" else num_slots(problem, pairs, tactic.tokens)
        if slots + tactic.group > CHAIN_SLOTS:
            return f"a chain counts at most {CHAIN_SLOTS} tiles"
    if tactic.path == "wide":
        return _unfit_wide(problem, tactic)
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


def _unfit_wide(problem: MoeProblem, tactic: Tactic) -> str | None:
    if not gluon_plan.runs_here():
        return "the wide path needs the tensor cores of compute capability 9.0, and no interpreter"
    if problem.weight_format != "nvfp4" or problem.input_format is not None:
        return "the wide path takes NVFP4 weights and bf16 activations"
    if tactic.route != "sorted" or tactic.combine != "reduce" or tactic.split != 1:
        return "the wide path takes sorted pairs, and sums whole ones in order"
    for stage, (rows, turn, warps, _) in enumerate(tactic.tiles):
        width = tactic.widths[stage]
        if warps not in (4, 8) or rows not in (16 * warps, 32 * warps) or turn not in (1, 2, 4):
            return "a wide tile has 64 or 128 rows for each 4 of 4 or 8 warps, and 1, 2 or 4 stages a turn"
        most, extra = gluon_plan.parts(width)
        if most not in (64, 128, 256) or extra not in (0, 16, 32, 64):
            return "a wide tile has 64, 128 or 256 pairs, or 16, 32 or 64 more"
        if rows * width > gluon_plan.SUMS[warps] * 32 * warps or (extra and tactic.ladder == 1):
            return "a wide tile has no more sums than registers, and by quarters only a power of two"
        if shared_bytes(problem, tactic, stage) * gluon_plan.programs(warps) > SHARED_BYTES:
            return "its tiles exceed shared memory"
    return None


# The default: the first whose pairs per hit expert are not exceeded. (limit, tactic)
NVFP4_DEFAULTS = (
    (5.0, chain(8, M, M)),
    (24.0, chain(32, M, M)),
    (50.0, fused(64, M, M, ladder=1)),
    (75.0, wide(96, SLIM, SLIM, ladder=2)),
    (115.0, wide(128, TALL, TALL)),
    (136.0, wide(144, TALL, TALL, ladder=2)),
    (176.0, wide(192, EVEN, EVEN, ladder=2)),
    (220.0, wide(128, TALL, TALL)),
    (275.0, wide(144, TALL, TALL, ladder=2)),
    (512.0, wide(128, TALL, TALL)),
    (2000.0, wide(256, FLAT, FLAT, ladder=2)),
    (float("inf"), wide(256, FLAT, FLAT, ladder=0)),
)
FULL = NVFP4_DEFAULTS[2][1]  # also where a chain has more tiles than it can count
# where the wide path cannot run
NOT_WIDE = ((2000.0, fused(128, B, M, ladder=1, tokens2=64)), (float("inf"), TABLE[-1]))
LONG = 8192  # columns of a second product that few rows of tiles are shared out over
DEEP = 6144  # columns of a first product whose tiles last long enough for more stages
LARGE = (*NVFP4_DEFAULTS[2:8], (275.0, wide(288, FLAT, FLAT, ladder=2)), *NVFP4_DEFAULTS[9:])
DEEP_DEFAULTS = ((5.0, chain(8, M5, M5)), NVFP4_DEFAULTS[1], *LARGE)
LONG_DEFAULTS = ((5.0, chain(8, T, T, split=2)), (24.0, chain(32, M, M, split=2)), *LARGE)
DENSE_DEFAULTS = ((10.0, fused(16, S, S, together=0)), (24.0, fused(32, S, S)), (float("inf"), TABLE[-1]))


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """What runs before anything is tuned: by pairs per expert, as measured."""
    p, pairs = problem, num_tokens * problem.top_k
    if p.weight_format != "nvfp4":
        return _dense_default(p, num_tokens)
    long, deep = p.intermediate_size >= LONG, p.hidden_size >= DEEP
    if num_tokens == 1:
        tiles = (S, M) if deep else (T, T)
        chosen = chain(8, T, T, "direct", split=4, ahead=16) if long else fused(8, *tiles, "direct")
    elif long and pairs <= 16:
        chosen = chain(8, S, S, "direct", split=8)
    elif pairs <= 16 or (pairs <= DIRECT_PAIRS and 4 * pairs <= p.num_experts):
        tile = S if pairs <= 16 and not deep else S6
        chosen = chain(8, tile, tile, "direct")
    elif pairs <= min(64, p.num_experts):
        chosen = chain(8, S, S)
    else:
        per_expert = pairs / min(p.num_experts, pairs)
        table = LONG_DEFAULTS if long else DEEP_DEFAULTS if deep else NVFP4_DEFAULTS
        chosen = next(t for most, t in table if per_expert <= most)
        if chosen.path == "wide" and unfit(p, chosen, num_tokens) is not None:
            chosen = next(t for most, t in NOT_WIDE if per_expert <= most)
    if p.input_format is not None and chosen.path == "chain":
        chosen = replace(chosen, path="fused", ahead=0)
    chosen = fitted(p, chosen)
    return chosen if unfit(p, chosen, num_tokens) is None else fitted(p, FULL)


def _dense_default(p: MoeProblem, num_tokens: int) -> Tactic:
    pairs = num_tokens * p.top_k
    if pairs <= 16 or (pairs <= DIRECT_PAIRS and 4 * pairs <= p.num_experts):
        return fitted(p, fused(16, S, S, "direct"))
    per_expert = pairs / min(p.num_experts, pairs)
    chosen = fitted(p, next(t for most, t in DENSE_DEFAULTS if per_expert <= most))
    return chosen if unfit(p, chosen, num_tokens) is None else fitted(p, FULL)


HBM, TENSOR, INSTRUCTIONS, LAUNCH = 2.7e12, 6.5e14, 2.0e13, 3e-6  # bytes/s, FLOP/s, lane instructions/s, s
SPREAD = (-1.4, -0.9, -0.5, -0.2, 0.2, 0.5, 0.9, 1.4)  # standard deviations: the middles of eight equal parts
DECODE = 28 / 8  # instructions per weight, counted in the SASS of the loop


def expected(each: float, width: int, ladder: int) -> tuple[float, float]:
    """(tiles, their columns in all) of an expert that draws `each` pairs on average, as a binomial spreads them."""
    tiles = columns = 0.0
    for z in SPREAD:
        count = max(1.0, each + z * math.sqrt(each))
        full = math.ceil(count / width) - 1
        step = gluon_plan.parts(width)[0] / (1, 4, 2)[ladder]
        last = min(width, math.ceil((count - full * width) / step) * step)
        tiles += (full + 1) / len(SPREAD)
        columns += (full * width + last) / len(SPREAD)
    return tiles, columns


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds, for the order in which candidates are tried: a roofline of bytes, products and
    decoding.

    Tokens are taken to draw their experts at random, all alike.
    """
    p, pairs = problem, num_tokens * problem.top_k
    hit = p.num_local_experts * (1 - (1 - 1 / p.num_experts) ** pairs)
    each = pairs / p.num_experts * p.num_local_experts / hit  # pairs of an expert that is hit
    packed = p.weight_format == "nvfp4"
    total = LAUNCH * (3 + (tactic.route == "sorted") - (tactic.path == "chain"))
    sizes = ((p.gate_up_rows, p.hidden_size), (p.hidden_size, p.intermediate_size))
    for (rows, columns), width, tile in zip(sizes, tactic.widths, tactic.tiles, strict=True):
        weights = hit * rows * columns
        tiles, padded = expected(each, width, tactic.ladder)
        programs = hit * tiles * rows / tile[0] * (tactic.split if columns == p.intermediate_size else 1)
        memory = weights * (0.5625 if packed else 2.0) / HBM / min(1.0, programs / 264)
        products = 2 * rows * columns * hit * padded / TENSOR
        if tactic.path == "dense":
            products /= 1.1
            memory += weights * 2.6 / HBM if packed else 0.0
            total += memory + products
        elif tactic.path == "wide":
            decoding = weights * tiles * DECODE / INSTRUCTIONS  # beside the products, and slows them
            total += max(memory, products / 0.9 + decoding / 2)
        else:
            decoding = weights * tiles * DECODE / INSTRUCTIONS if packed else 0.0
            total += max(memory, products + decoding)
    return total

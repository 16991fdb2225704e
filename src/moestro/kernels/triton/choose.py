"""Which tactics there are for a problem, which of them are valid, the default, and which are worth measuring.

Everything that is particular to a way to multiply is in its path; here is a loop over PATHS, and the default by pairs
per expert.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

from moestro.errors import BackendError
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.chip import multiplies_fp4
from moestro.kernels.triton.fp8_layout import block_scaled
from moestro.kernels.triton.paths import (
    PATHS,
    Path,
    chain,
    dense,
    dequantized,
    fp4,
    fp8,
    fp8_cuda,
    fp8_mx,
    fp8_once,
    fp8_once_cuda,
    fused,
    kind_of,
    warp_specialized,
)
from moestro.kernels.triton.paths.path import LONG_WALK, LONG_WALK_PAIRS, weight_bytes
from moestro.kernels.triton.tactic import DIRECT_PAIRS, MAX_PAIRS, NARROW, Tactic, Tile

log = logging.getLogger("moestro")

# Which tactics are worth measuring: those whose estimate is within FACTOR of the smallest. The estimate is a roofline,
# and wrong by up to 1.32 in favour of a slower tactic: of 120 sizes of eight models that were tuned without pruning,
# from 1 to 16384 tokens, a factor of 1.32 keeps the best one of all but one, where the default is as fast
# (benchmarks/results/h200-tuning.json; `moestro bench recall` computes it, tests/bench/test_recall.py fails if a
# measured best would be dropped). The rest is margin for sizes and kernels that were not measured; each kernel costs
# tuning about 0.2 s. What is left out can still be run, by name.
FACTOR = 1.4


def path_of(tactic: Tactic) -> Path | None:
    return PATHS.get(tactic.path)


def why_not(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic cannot run this many tokens of a problem; None if it can."""
    path, pairs = path_of(tactic), num_tokens * problem.top_k
    if path is None:
        return f"no path is called {tactic.path!r}; there are {', '.join(PATHS)}"
    if kind_of(problem) not in path.TABLE:
        return f"path {path.NAME!r} has no kernels for {_words(problem)}" + _hint(path, problem)
    if tactic.route == "direct" and pairs > DIRECT_PAIRS:
        return f"direct routing takes at most {DIRECT_PAIRS} pairs"
    if tactic.narrow not in NARROW:
        return f"narrow must be one of {NARROW}, got {tactic.narrow!r}"
    if tactic.narrow and (tactic.route != "sorted" or min(tactic.widths) < 64):
        return "narrower tiles need sorted pairs, and 16 tokens at least in the narrowest"
    if pairs > MAX_PAIRS:
        return f"more than {MAX_PAIRS} pairs"
    return path.why_not(problem, tactic, num_tokens)


def _words(problem: MoeProblem) -> str:
    inputs = (
        "activations as they are" if problem.input_format is None else f"{problem.input_format} activations"
    )
    return f"{problem.weight_format} weights with {inputs}"


def _hint(path: Path, problem: MoeProblem) -> str:
    """Why, where the path itself says more."""
    own = path.why_not(problem, next(iter(path.TABLE.values()))[0], 1)
    return "" if own is None else f": {own}"


def unsupported(problem: MoeProblem) -> str | None:
    """Why no path has kernels for a problem's formats; None if one has."""
    kind = kind_of(problem)
    rows = [(path, t) for path in PATHS.values() for t in path.TABLE.get(kind, ())]
    if any(path.why_not(problem, path.fitted(problem, t), 1) is None for path, t in rows):
        return None
    if rows:
        path, first = rows[0]
        return path.why_not(problem, path.fitted(problem, first), 1)
    return f"it has no kernels for {_words(problem)}"


def candidates(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The tactics that can run this many tokens, those estimated to be fast first."""
    kind = kind_of(problem)
    rows = [path.fitted(problem, t) for path in PATHS.values() for t in path.TABLE.get(kind, ())]
    if problem.batch_invariant:
        rows += [fitted(problem, t) for t in INVARIANT_ROWS]
    found = [t for t in dict.fromkeys(rows) if why_not(problem, t, num_tokens) is None]
    found.sort(key=lambda t: cost(problem, t, num_tokens))
    if (first := _untried_default(problem, num_tokens)) is not None:
        found.sort(key=lambda t: t != first)
    return found


def _untried_default(problem: MoeProblem, num_tokens: int) -> Tactic | None:
    """The default on tensor cores that we have not run: nobody has measured whether the estimate is right there."""
    if multiplies_fp4(problem):
        return fp4.default(problem, num_tokens)
    return fp8_mx.default(problem, num_tokens) if block_scaled(problem) else None


def worth_measuring(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The candidates within FACTOR of the smallest estimate, that one first."""
    found = candidates(problem, num_tokens)
    if _untried_default(problem, num_tokens) is not None:
        return found
    estimates = [cost(problem, tactic, num_tokens) for tactic in found]
    limit = FACTOR * min(estimates, default=0.0)
    return [tactic for tactic, estimate in zip(found, estimates, strict=True) if estimate <= limit]


def cost(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimated seconds; infinite for a path that is not here."""
    path = path_of(tactic)
    return float("inf") if path is None else path.cost(problem, tactic, num_tokens)


def fitted(problem: MoeProblem, tactic: Tactic) -> Tactic:
    """The tactic with steps and stages that suit a problem."""
    path = path_of(tactic)
    return tactic if path is None else path.fitted(problem, tactic)


# The default of quantised weights, by pairs per hit expert: the first limit that is not exceeded. (limit, tactic)
_CHAIN16, _CHAIN32 = chain.tactic(16, Tile(128, 2, 4, 3)), chain.tactic(32, Tile(128, 2, 4, 3))
FULL = fused.tactic(64, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3), narrow="quarters")  # runs everywhere
_WS128 = warp_specialized.tactic(128, Tile(256, 4, 8, 7))
_WS144 = warp_specialized.tactic(144, Tile(256, 4, 8, 7), "halves")
_MANY = (
    (50.0, FULL),
    (75.0, warp_specialized.tactic(96, Tile(256, 4, 8, 9), "halves")),
    (115.0, _WS128),
    (136.0, _WS144),
    (176.0, warp_specialized.tactic(192, Tile(128, 4, 8, 7), "halves")),
    (220.0, _WS128),
)
_MOST = (
    (512.0, _WS128),
    (2000.0, warp_specialized.tactic(256, Tile(128, 4, 8, 5), "halves")),
    (float("inf"), warp_specialized.tactic(256, Tile(128, 4, 8, 5), "")),
)
# Of about 256 pairs an expert a tile of 288 is up to 4 % faster than two of 144 where each has as many, and up to 20 %
# slower under skewed routing (benchmarks/results/h200-routing.json).
_LARGE = (*_MANY, (275.0, _WS144), *_MOST)
SIXTEEN = 8.0  # pairs per expert up to which tiles of 16 are enough
PACKED_DEFAULTS = ((5.0, chain.tactic(8, Tile(128, 2, 4, 3))), (SIXTEEN, _CHAIN16), (24.0, _CHAIN32), *_LARGE)
DEEP = 6144  # columns of a first product whose tiles last long enough for more stages
DEEP_DEFAULTS = ((5.0, chain.tactic(8, Tile(128, 2, 4, 5))), *PACKED_DEFAULTS[1:])
# of an odd number of 64-column blocks, gpt-oss's 45: steps of three blocks make tiles of 32 pairs too large
ODD_DEFAULTS = (PACKED_DEFAULTS[0], (12.0, _CHAIN16), *PACKED_DEFAULTS[2:])
BYTES_LIMIT = 1500.0  # pairs per expert from which codes of a byte are dequantised once
LONG = 8192  # columns of a second product that few rows of tiles are shared out over
LONG_DEFAULTS = (
    (5.0, chain.tactic(8, Tile(32, 4, 2, 4), split_k=2)),
    (24.0, chain.tactic(32, Tile(128, 2, 4, 3), split_k=2)),
    *_LARGE,
)
# where the warp-specialized path cannot run
WITHOUT_WGMMA = (
    (2000.0, fused.tactic(128, Tile(128, 1, 8, 4), Tile(128, 2, 4, 3), narrow="quarters", pairs2=64)),
    (float("inf"), dequantized.LARGE),
)
# Of dense weights. As measured on an H200 at 16, 64, 256, 1024 and 4096 pairs per expert (docs/kernels.md); between, by
# what a tile holds: where every second expert has a few pairs more than that, the next one.
DENSE_DEFAULTS = (
    (10.0, fused.tactic(16, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), overlap_steps=False)),
    (24.0, fused.tactic(32, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4))),
    (45.0, dense.FEW),
    (85.0, dense.tactic(96, Tile(128, 4, 8, 7))),
    (115.0, dense.FULL),
    (136.0, dense.tactic(144, Tile(256, 4, 8, 4))),
    (176.0, dense.tactic(192, Tile(128, 4, 8, 5))),
    (275.0, dense.tactic(288, Tile(128, 4, 8, 4))),
    (float("inf"), dense.FULL),
)
# columns of x of which 16 tiles still share the L2 cache: 2048 take 4 % less so, 7168 take 7 % more
SHORT = 3072
# Of batch-invariant problems, beside those of the table that give a row the same bits whatever its batch: the fused,
# warp-specialized and dequantized paths agree bit for bit (benchmarks/results/h200-formats.json), but for tiles of
# mma.sync and split columns.
INVARIANT = fused.tactic(16, Tile(128, 2, 4, 3), Tile(128, 2, 4, 3))
_DIRECT16 = fused.tactic(16, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), "direct")
INVARIANT_ONE_LONG = fused.tactic(16, Tile(64, 2, 4, 6), Tile(64, 2, 4, 6), "direct")
INVARIANT_FEW_DEEP = chain.tactic(16, Tile(128, 2, 4, 5))
INVARIANT_FEW_LONG = chain.tactic(16, Tile(64, 4, 4, 4))
INVARIANT_DIRECT = chain.tactic(16, Tile(128, 2, 4, 5), "direct")
INVARIANT_ROWS = (
    _DIRECT16,
    INVARIANT_ONE_LONG,
    chain.tactic(16, Tile(64, 2, 4, 4), "direct"),
    chain.tactic(16, Tile(128, 2, 4, 3), "direct"),
    INVARIANT_DIRECT,
    chain.tactic(16, Tile(64, 2, 4, 6)),
    INVARIANT_FEW_LONG,
    _CHAIN16,
    INVARIANT_FEW_DEEP,
    INVARIANT,
)


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """What runs before anything is tuned: by pairs per expert, as measured. BackendError beyond MAX_PAIRS."""
    p = problem
    if (pairs := num_tokens * p.top_k) > MAX_PAIRS:
        raise BackendError(
            f"backend 'triton' takes at most {MAX_PAIRS} pairs at once, got {num_tokens} tokens of {p.top_k}, which are "
            f"{pairs}: fewer tokens at a time, or a smaller max_num_tokens of a layer"
        )
    if (untried := _untried_default(p, num_tokens)) is not None:
        return untried
    if kind_of(p) == "fp8":
        return _fp8_default(p, num_tokens)
    chosen = _dense_default(p, num_tokens) if p.weight_format == "bf16" else _packed_default(p, num_tokens)
    if p.batch_invariant and p.weight_format != "bf16":
        chosen = _invariant_default(p, num_tokens) or chosen
    if p.input_format is not None and chosen.path == "chain":
        chosen = replace(chosen, path="fused", prefetch_kib=0)
    for tactic in (chosen, replace(chosen, split_k=1), *INVARIANT_ROWS * p.batch_invariant, FULL, INVARIANT):
        tactic = fitted(p, tactic)
        if (reason := why_not(p, tactic, num_tokens)) is None:
            return tactic
    raise BackendError(f"backend 'triton' has no default for {num_tokens} tokens of {p}: {reason}")


def _invariant_default(p: MoeProblem, num_tokens: int) -> Tactic | None:
    """Of few pairs of quantised weights, as measured on an H200 (benchmarks/results/h200-few-tokens.json); else None."""
    pairs = num_tokens * p.top_k
    long, deep = p.intermediate_size >= LONG, p.hidden_size >= DEEP
    if num_tokens == 1:
        return INVARIANT_ONE_LONG if long else _DIRECT16
    if pairs <= 16:
        if long:
            return INVARIANT_FEW_LONG if pairs <= 8 else _CHAIN16
        return INVARIANT_FEW_DEEP if deep else _DIRECT16
    if pairs <= DIRECT_PAIRS and 4 * pairs <= p.num_experts:
        return INVARIANT_DIRECT
    return _CHAIN16 if pairs <= SIXTEEN * min(p.num_experts, pairs) else None


def _packed_default(p: MoeProblem, num_tokens: int) -> Tactic:
    pairs = num_tokens * p.top_k
    long, deep = p.intermediate_size >= LONG, p.hidden_size >= DEEP
    odd = -(-p.hidden_size // 64) % 2 == 1
    if num_tokens == 1:
        if long:
            return chain.tactic(8, Tile(32, 4, 2, 4), "direct", split_k=4, prefetch_kib=16)
        tiles = (Tile(64, 2, 4, 4), Tile(128, 2, 4, 3)) if deep else (Tile(32, 4, 2, 4), Tile(32, 4, 2, 4))
        return fused.tactic(8, *tiles, "direct")
    if long and pairs <= 16:
        return chain.tactic(8, Tile(64, 2, 4, 8) if pairs <= 4 else Tile(128, 2, 4, 5), "direct", split_k=4)
    if pairs <= 16 or (pairs <= DIRECT_PAIRS and 4 * pairs <= p.num_experts):
        few_tile = Tile(64, 2, 4, 6) if pairs > 16 else Tile(64, 4, 4, 4) if deep else Tile(64, 2, 4, 4)
        return chain.tactic(8, few_tile, "direct")
    if pairs <= min(64, p.num_experts):
        return chain.tactic(8, Tile(128, 2, 4, 3) if odd else Tile(64, 2, 4, 4))
    per_expert = pairs / min(p.num_experts, pairs)
    table = LONG_DEFAULTS if long else DEEP_DEFAULTS if deep else ODD_DEFAULTS if odd else PACKED_DEFAULTS
    chosen = next(t for most, t in table if per_expert <= most)
    if per_expert > BYTES_LIMIT and weight_bytes(p) > 1.0 and p.input_format is None:
        return dequantized.LARGE
    if chosen.path == "warp_specialized" and why_not(p, fitted(p, chosen), num_tokens) is not None:
        chosen = next(t for most, t in WITHOUT_WGMMA if per_expert <= most)
    return chosen


def _dense_default(p: MoeProblem, num_tokens: int) -> Tactic:
    pairs = num_tokens * p.top_k
    if pairs <= 16 or (pairs <= DIRECT_PAIRS and 4 * pairs <= p.num_experts):
        return _DIRECT16
    per_expert = pairs / min(p.num_experts, pairs)
    chosen = next(t for most, t in DENSE_DEFAULTS if per_expert <= most)
    if chosen.path == dense.NAME and why_not(p, fitted(p, chosen), num_tokens) is not None:
        return dequantized.LARGE
    long_walk = per_expert >= LONG_WALK_PAIRS and p.hidden_size <= SHORT
    return replace(chosen, raster_group=LONG_WALK) if long_walk and chosen == dense.FULL else chosen


# Of e4m3 activations, by pairs per hit expert. Batch-invariant problems keep to what was measured on an H200
# (benchmarks/results/h200-fp8.json): decoding once costs 0.7 ms for DeepSeek-V3's 1.4 G weights, and multiplies at 1.0 to
# 1.1 PFLOP/s where decoding into shared memory beside does at 0.7.
FP8_INVARIANT = (
    (64.0, fp8.tactic(64, Tile(256, 4, 4, 3))),
    (400.0, fp8.tactic(128, Tile(256, 3, 8, 3))),
    (float("inf"), fp8_once.LARGE),
)
# measured on an H200 (benchmarks/results/h200-fp8-cuda.json; beyond 2000 pairs `tiles` of h200-fp8-blocks.json)
FP8_DEFAULTS = (
    (1.5, fp8_cuda.tactic(16, 128)),
    (24.0, fp8_cuda.tactic(32, 256)),
    (38.0, fp8_cuda.tactic(48, 256)),
    (52.0, fp8_cuda.tactic(64, 256)),
    (70.0, fp8_cuda.tactic(80, 256)),
    (115.0, fp8_cuda.tactic(128, 128)),
    (300.0, fp8_cuda.tactic(144, 128)),
    (2000.0, fp8_cuda.tactic(160, 128)),
    (float("inf"), fp8_cuda.tactic(144, 128)),
)
# FP8 blocks, of one token and of many (benchmarks/results/h200-fp8-blocks.json)
FP8_BLOCKS = fp8_once_cuda.tactic(128, 256)


def _fp8_default(p: MoeProblem, num_tokens: int) -> Tactic:
    pairs = num_tokens * p.top_k
    per_expert = pairs / min(p.num_experts, pairs)
    blocks = p.weight_format == "fp8_block"
    slower = ((float("inf"), fp8_once.LARGE),) if blocks else FP8_INVARIANT
    if not p.batch_invariant:
        chosen = FP8_BLOCKS if blocks else next(t for most, t in FP8_DEFAULTS if per_expert <= most)
        if why_not(p, chosen, num_tokens) is None:
            return chosen
        if (reason := nvrtc.why_missing()) is not None:
            _say_slower(reason)
    return next(t for most, t in slower if per_expert <= most)


@functools.cache
def _say_slower(reason: str) -> None:
    """Once for each reason."""
    log.warning("FP8 products run on slower kernels than could be: %s", reason)

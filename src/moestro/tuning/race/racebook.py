"""What a race learned, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moestro.tuning.race.statistics import Floats, gaps, half_width
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["CandidateEvidence", "RaceResult", "summarise"]


@dataclass(frozen=True)
class CandidateEvidence:
    """What a race learned about one candidate. Ratios are time over the default's: below 1 is faster."""

    index: int
    samples: int  # runs, over all probes
    median: tuple[float, ...]  # seconds, per probe; empty without samples
    spread: tuple[float, ...]  # robust relative standard deviation of single runs, per probe
    ratio: float | None  # worst probe; None where nothing was measured
    ratio_low: float | None  # interval of `ratio` that holds at every look, at the policy's confidence
    ratio_high: float | None
    probe_ratios: tuple[float, ...]
    left_at: int | None  # the round in which it left; None: it stayed to the end
    # "won" | "tied" | "undecided" | "default beaten" | "slower" | "no gain" | "screened" | "failed: ..."
    reason: str


@dataclass(frozen=True)
class RaceResult:
    winner: int
    leader: int  # the smallest ratio at the end; differs from the winner in a tie
    candidates: tuple[CandidateEvidence, ...]
    noise_floor: float  # relative
    rounds: int
    samples: int
    seconds: float  # wall time
    ended: str  # "decided" | "rounds" | "time" | "budget"


def summarise(
    logs: Floats,
    index: int,
    default: int,
    policy: MeasurementPolicy,
    *,
    samples: int,
    left_at: int | None,
    reason: str,
) -> CandidateEvidence:
    """The evidence for one candidate, from the race's log seconds [rounds, 2, candidates, probes]."""
    probes = logs.shape[-1]
    mine = logs[:, :, index].reshape(-1, probes)
    mine = mine[np.isfinite(mine).all(axis=-1)]
    middle = np.median(mine, axis=0) if len(mine) else np.empty(0)
    spread = 1.4826 * np.median(np.abs(mine - middle), axis=0) if len(mine) else middle
    if index == default:
        ratio, low, high, per_probe = _SAME if len(mine) else _UNKNOWN
        per_probe = (1.0,) * probes if len(mine) else ()
    else:
        ratio, low, high, per_probe = _ratio(logs, index, default, policy)
    return CandidateEvidence(
        index=index,
        samples=samples,
        median=tuple(np.exp(middle).tolist()),
        spread=tuple(spread.tolist()),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        probe_ratios=per_probe,
        left_at=left_at,
        reason=reason,
    )


Ratio = tuple[float | None, float | None, float | None, tuple[float, ...]]
_UNKNOWN: Ratio = (None, None, None, ())
_SAME: Ratio = (1.0, 1.0, 1.0, ())


def _ratio(logs: Floats, index: int, default: int, policy: MeasurementPolicy) -> Ratio:
    """(ratio, low, high, per probe) to the default, over the rounds in which both ran."""
    both = logs[:, :, [index]] - logs[:, :, [default]]
    both = both[np.isfinite(both).all(axis=(1, 2, 3))]
    if not len(both):
        return _UNKNOWN
    if len(both) == 1:
        each = np.exp(both[0, 0, 0])
        return float(each.max()), 0.0, math.inf, tuple(each.tolist())
    gap = gaps(both)
    width = half_width(gap, (1 - policy.confidence) / 2 / len(gap.location[0]), policy.resolution)[0]
    middle = gap.location[0]
    low, high = float(np.exp((middle - width).max())), float(np.exp((middle + width).max()))
    return float(np.exp(middle.max())), low, high, tuple(np.exp(middle).tolist())

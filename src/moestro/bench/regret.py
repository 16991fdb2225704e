"""Regret: how much slower the tactic that a tuner picks is than the best one, and whether it picks it again.

Shared by the simulated harness (moestro.bench.regret_sim: thousands of tunings on paper) and the real one
(moestro.bench.regret_real: a tuner on a device, judged by an interleaved oracle).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NEAR", "Pick", "Summary", "summarise"]

NEAR = 0.01  # of the best's time: who is no further off is near


@dataclass(frozen=True)
class Pick:
    """What one tuning chose, and what that cost."""

    choice: int  # identity of the tactic
    slowdown: float  # true time of the choice over the best's, minus 1
    against_default: float  # true time of the choice over the default's, minus 1: above 0 is slower
    samples: int
    seconds: float  # of measured calls
    noise_floor: float = 0.0


@dataclass(frozen=True)
class Summary:
    """Many tunings of one scheme. Ratios are relative: 0.01 is 1 %."""

    scheme: str
    tunings: int
    best_picked: float  # share
    near_best: float  # share within NEAR of the best, or within what the true times are known to
    same_pick: float  # share of the most frequent choice
    flips: float  # share of consecutive pairs of tunings that disagree
    regret_median: float
    regret_p95: float
    regret_worst: float
    slower_than_default: float  # share whose choice is slower than the default by more than the noise floor
    samples: float  # mean
    seconds: float  # mean


def summarise(scheme: str, picks: Sequence[Pick], error: float = 0.0) -> Summary:
    """Consecutive picks (0 and 1, 2 and 3 ...) are repetitions of the same tuning.

    error: how well the true times are known; who is within it of the best counts as the best.
    """
    regrets = np.array([pick.slowdown for pick in picks])
    choices = [pick.choice for pick in picks]
    pairs = list(zip(choices[::2], choices[1::2], strict=False))
    return Summary(
        scheme=scheme,
        tunings=len(picks),
        best_picked=float((regrets <= error).mean()),
        near_best=float((regrets <= max(NEAR, error)).mean()),
        same_pick=Counter(choices).most_common(1)[0][1] / len(choices),
        flips=sum(a != b for a, b in pairs) / max(1, len(pairs)),
        regret_median=float(np.median(regrets)),
        regret_p95=float(np.quantile(regrets, 0.95)),
        regret_worst=float(regrets.max()),
        slower_than_default=sum(p.against_default > p.noise_floor for p in picks) / len(picks),
        samples=float(np.mean([pick.samples for pick in picks])),
        seconds=float(np.mean([pick.seconds for pick in picks])),
    )

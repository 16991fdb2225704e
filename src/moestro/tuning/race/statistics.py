"""How far apart two candidates are, and how sure that is: robust location, pooled scale, a bound for
repeated looks.

Input is a table of log-ratios, one row per paired round. All functions are vectorised over candidates and
probes.

Location: the median, then one Huber step (the mean of the residuals clipped at two scales). It has the
median's resistance to outliers and 95 % of the mean's efficiency where the noise is normal; the median
alone has 64 %, that is half as many rounds again.

Scale: the clipped residuals' standard deviation. With few rounds one pair's own scale is a guess, so it is
shrunk towards the scale pooled over all pairs of the round table, which share the machine, its clock and
its neighbours.

Bound: a race looks at the data after every round, and a fixed-sample interval looked at repeatedly is wrong
far more often than its level says. For log-ratios of mean mu and standard deviation s, exp(d/s² · (sum -
n·mu) - n·d²/(2s²)) is a martingale of mean 1 for any fixed step d, so by Ville's inequality it exceeds
1/alpha at *any* look with probability at most alpha. Solved for mu this is a straight line in n:

    mu >= location - (s² · ln(1/alpha) / (n·d) + d/2)        for all n at once, with probability 1 - alpha.

For d = resolution it is the boundary of Wald's sequential test (1945) of "mu is at the bound" against "mu
is d beyond it", the fewest expected rounds of any test with these errors. Larger steps see larger
differences sooner, so six lines (d = resolution · 1, 2, 4 ... 32), which share alpha as 1/2, 1/4, 1/8 ...,
are used and the narrowest one counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Gaps", "gaps", "half_width"]

Floats = NDArray[np.float64]

CLIP = 2.0  # scales
POOL_WEIGHT = 10.0  # rounds that the pooled scale is worth
SCALE_FLOOR = 1e-4  # 0.01 %: no clock is better, and a simulated one without noise must not divide by zero
STEPS = 2.0 ** np.arange(6)
LOG_SHARES = np.log(2.0) * np.arange(1, 7)


@dataclass(frozen=True)
class Gaps:
    """Log-ratios of candidates to a reference: [candidates, probes] each."""

    location: Floats
    scale: Floats  # standard deviation of one round's log-ratio
    rounds: int | Floats  # of which they were made: [candidates, probes] where that differs

    @property
    def standard_error(self) -> Floats:
        return np.asarray(self.scale / np.sqrt(self.rounds))


def gaps(log_ratios: Floats) -> Gaps:
    """Location and scale of log-ratios [rounds >= 2, 2, candidates, probes], two per round.

    Both are the same number where both candidates ran once in that round. Each is clipped before the two are
    averaged: the mean of two runs catches outliers twice as often as one run, and is a biased reference.
    """
    n, _, *rest = log_ratios.shape
    table = log_ratios.reshape(2 * n, -1)
    middle = _middle(table)
    residual = table - middle
    size = np.abs(residual)
    pairs = len(middle)
    # With odd n the residual of each pair's middle round is 0 and says nothing: the quantile moves up by it.
    pooled = 1.4826 * np.partition(size, pairs * (n + 1) - 1, axis=None)[pairs * (n + 1) - 1]
    own = 1.4826 * _middle(size)
    clip = CLIP * np.sqrt(_shrink(own**2, pooled**2, n, pairs)) + SCALE_FLOOR
    clipped = np.clip(residual, -clip, clip)
    rounds = (clipped[::2] + clipped[1::2]) / 2
    squares = (rounds**2).sum(axis=0) / (n - 1)
    freedom = (n - 1) + min(POOL_WEIGHT, (pairs - 1) * (n - 1))
    inside = (clipped == residual).mean()  # a clipped mean moves by this much when the data move by 1
    variance = _shrink(squares, squares.mean(), n, pairs) * (1 + 4 / freedom) / inside**2 + SCALE_FLOOR**2
    location = middle + rounds.mean(axis=0)
    return Gaps(location.reshape(rest), np.sqrt(variance).reshape(rest), n)


def half_width(gap: Gaps, alpha: float, resolution: float) -> Floats:
    """Half the width of the bound that holds at every look at once with probability 1 - alpha (one-sided)."""
    steps = resolution * STEPS
    rounds = np.asarray(gap.rounds)[..., None]
    lines = (gap.scale[..., None] ** 2) * ((LOG_SHARES - np.log(alpha)) / (rounds * steps)) + steps / 2
    return np.asarray(lines.min(axis=-1))


def _middle(table: Floats) -> Floats:
    n = len(table)
    ordered = np.sort(table, axis=0)
    return np.asarray((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)


def _shrink(own: Floats, pooled: float, n: int, pairs: int) -> Floats:
    weight = min(POOL_WEIGHT, (pairs - 1) * (n - 1))
    return np.asarray((weight * pooled + (n - 1) * own) / (weight + n - 1))

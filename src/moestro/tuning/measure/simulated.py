"""A clock that runs on paper: noise, slow drift and outliers on virtual time, so that tuning can be tested
by the thousand and repeated by seed.

A runner calls `clock.advance(seconds)` where a real one would compute; SimulatedTimer(clock) is the timer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["SimulatedClock", "SimulatedTimer"]

BLOCK = 4096


@dataclass
class SimulatedClock:
    """Measured = true seconds · exp(noise · normal) · (1 + drift · sin(now)), sometimes · outlier_factor."""

    noise: float = 0.02  # standard deviation of the log of one run
    drift: float = 0.05  # peak of a sine over virtual time, with a random phase
    drift_period: float = 1.0  # seconds of virtual time
    outliers: float = 0.01  # share of runs
    outlier_factor: float = 3.0
    seed: int = 0
    now: float = 0.0  # virtual seconds since the start, as measured
    runs: int = 0
    _factors: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._phase = float(self._random.uniform(0, 2 * math.pi))

    def advance(self, seconds: float) -> float:
        """Let a run of this true length happen; returns how long it took."""
        if not self._factors:
            factor = np.exp(self.noise * self._random.standard_normal(BLOCK))
            factor[self._random.random(BLOCK) < self.outliers] *= self.outlier_factor
            self._factors = factor.tolist()
        angle = 2 * math.pi * self.now / self.drift_period + self._phase
        took = seconds * self._factors.pop() * (1 + self.drift * math.sin(angle))
        self.now += took
        self.runs += 1
        return took

    def sampler(self, seconds: float) -> Callable[[], float]:
        """A sampler of a candidate whose true time is `seconds`."""
        return lambda: self.advance(seconds)


@dataclass(frozen=True)
class SimulatedTimer:
    """Reads virtual time: the seconds by which `call` advanced the clock."""

    clock: SimulatedClock
    name: str = "simulated"

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            before = self.clock.now
            call()
            return self.clock.now - before

        return sample

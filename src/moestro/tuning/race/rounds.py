"""Rounds of samples: runs candidates in a given order and keeps their log times, one row a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from moestro.errors import TuningError
from moestro.tuning.race.statistics import Floats
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["Combine", "Rounds", "Sampler"]

Sampler = Callable[[], float]
Combine = Callable[[list[float]], list[float]]

GO, TIME, BUDGET, INCOMPLETE = 0.0, 1.0, 2.0, 3.0  # a round's flag, the largest of all ranks'
ENDED = {GO: "", TIME: "time", BUDGET: "budget", INCOMPLETE: "budget"}  # the same word on all ranks


class Rounds:
    """The measuring half of a race.

    logs: log seconds [rounds, 2, candidates, probes]: both runs of a candidate in a round, or its only one
    twice; nan where it did not run. twins: log-ratio of the two runs of whoever ran twice, [probes] each.
    failed: reasons of candidates whose sampler raised, here or on a rank. ended: "" | "time" | "budget".
    """

    def __init__(
        self,
        samplers: Sequence[tuple[Sampler, ...]],
        policy: MeasurementPolicy,
        stop: Callable[[], bool] | None = None,
        abort: Callable[[], bool] | None = None,
        combine: Combine | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.samplers, self.policy, self.clock = samplers, policy, clock
        self.stop, self.abort, self.combine = stop, abort, combine
        self.probes = len(samplers[0])
        self.count = 0
        self.samples = [0] * len(samplers)
        self.twins: list[Floats] = []
        self.failed: dict[int, str] = {}
        self.ended = ""
        self.started = clock()
        self._logs = np.full((32, 2, len(samplers), self.probes), np.nan)

    @property
    def logs(self) -> Floats:
        return self._logs[: self.count]

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    def run(self, order: Sequence[int]) -> None:
        """A new round: each candidate in `order` once; who is in it twice, twice."""
        logs = self._measure(order)
        if logs is None:
            return
        if self.count == len(self._logs):
            self._logs = np.concatenate([self._logs, np.full_like(self._logs, np.nan)])
        row = self._logs[self.count]
        self.count += 1
        seen: dict[int, int] = {}
        for position, i in enumerate(order):
            if i in self.failed:
                continue
            if i in seen:
                self.twins.append(logs[seen[i]] - logs[position])
                row[1, i] = logs[position]
            else:
                row[:, i] = logs[position]
            seen[i] = position

    def again(self, order: Sequence[int]) -> None:
        """Run these once more and keep the faster time of the last round and this."""
        logs = self._measure(order)
        if logs is not None:
            row = self._logs[self.count - 1]
            for i, log in zip(order, logs, strict=True):
                row[:, i] = np.minimum(row[:, i], log)

    def _measure(self, order: Sequence[int]) -> Floats | None:
        """Log seconds [order, probes]; None if time ran out in the middle."""
        flat: list[float] = []
        for i in order:
            flat += [0.0] * self.probes if self._aborted() else self._sample(i)
        flat.append(self._flag(flat))
        if self.combine is not None:
            flat = self.combine(flat)
        flag = flat.pop()
        self.ended = ENDED[flag]
        if flag == INCOMPLETE:
            return None
        times = np.array(flat).reshape(len(order), self.probes)
        for i, finite in zip(order, np.isfinite(times).all(axis=-1), strict=True):
            if not finite:
                self.failed.setdefault(i, "failed on another rank")
        return np.asarray(np.log(times))

    def _flag(self, times: list[float]) -> float:
        """How this rank sees the round."""
        if not all(times):
            return INCOMPLETE
        if not self._late():
            return GO
        return TIME if self.ended == "time" else BUDGET

    def _sample(self, i: int) -> list[float]:
        if i in self.failed:
            return [math.inf] * self.probes
        try:
            seconds = [float(sampler()) for sampler in self.samplers[i]]
            self.samples[i] += self.probes
            if not all(0 < s < math.inf for s in seconds):
                raise TuningError(f"the clock read {seconds}, expected positive seconds")
        except Exception as error:
            self.failed[i] = f"failed: {type(error).__name__}: {error}"
            return [math.inf] * self.probes
        return seconds

    def _aborted(self) -> bool:
        if not self.ended and self.abort is not None and self.abort():
            self.ended = "budget"
        return bool(self.ended)

    def _late(self) -> bool:
        if not self.ended:
            limit = self.policy.max_seconds
            if self.stop is not None and self.stop():
                self.ended = "budget"
            elif limit is not None and self.seconds > limit:
                self.ended = "time"
        return bool(self.ended)

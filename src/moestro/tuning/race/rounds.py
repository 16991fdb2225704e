"""Rounds of samples: runs candidates in a given order, keeps their log times, one row a round, and says what they
amount to.

A clock may read nonsense once (0, a negative number, NaN, infinity): it is asked again, READINGS times at most.
Rows of an earlier race at the same bucket can be given to begin with, and taken out again (`Samples`), so that a
race which a budget cuts short is not begun anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moestro.errors import TuningError
from moestro.tuning.race.statistics import Floats, gaps, half_width
from moestro.tuning.spec.evidence import CandidateEvidence
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["ClockError", "Combine", "Rounds", "Sampler", "Samples", "as_seconds"]

Sampler = Callable[[], float]
Combine = Callable[[list[float]], list[float]]

# A round's flag, the largest of all ranks', and what it says: all ranks end with the same word.
GO, TIME, BUDGET, INCOMPLETE = 0.0, 1.0, 2.0, 3.0
ENDED = {GO: "", TIME: "time", BUDGET: "budget", INCOMPLETE: "budget"}
READINGS = 5  # of the clock in a row that make no sense, before a candidate cannot be timed
LARGEST_LOG = 700.0  # of a ratio that is a float
ROWS_KEPT = 200  # of a race that goes on another time


class ClockError(TuningError):
    """The clock makes no sense, whatever is timed."""


def as_seconds(reading: Any) -> float:
    """A clock's reading as a number. Raises ClockError for what is none."""
    try:
        return float(reading)
    except (TypeError, ValueError):
        raise ClockError(f"the clock read {reading!r}, expected positive seconds") from None


@dataclass(frozen=True)
class Samples:
    """Seconds of an unfinished race: for each candidate and round [first run, second run] by probe, or None."""

    rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return max(map(len, self.rows.values()), default=0)

    def table(self, names: Sequence[str], probes: int) -> Floats:
        """Log seconds [rounds, 2, candidates, probes]; nan where a candidate did not run."""
        logs = np.full((self.rounds, 2, len(names), probes), np.nan)
        for i, name in enumerate(names):
            for row, seconds in enumerate(self.rows.get(name, ())):
                value = np.asarray(seconds, dtype=float) if seconds is not None else None
                if value is not None and value.shape == (2, probes) and (value > 0).all():
                    logs[row, :, i] = np.log(value)
        return logs

    def with_table(self, names: Sequence[str], logs: Floats) -> Samples:
        """Those of `names` replaced by a table that begins with these rows; the last ROWS_KEPT rounds."""
        count = len(logs)
        rows = {name: [*seen, *[None] * (count - len(seen))] for name, seen in self.rows.items()}
        for i, name in enumerate(names):
            there = np.asarray(np.isfinite(logs[:, :, i]).all(axis=(1, 2)))
            seconds = np.exp(logs[:, :, i])
            rows[name] = [
                [[float(f"{s:.6g}") for s in run] for run in seconds[row]] if there[row] else None
                for row in range(count)
            ]
        return Samples({name: seen[-ROWS_KEPT:] for name, seen in rows.items()})


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
        earlier: Floats | None = None,
    ) -> None:
        self.samplers, self.policy, self.clock = samplers, policy, clock
        self.stop, self.abort, self.combine = stop, abort, combine
        self.probes = len(samplers[0])
        self.count = self.earlier = 0 if earlier is None else len(earlier)
        self.samples = [0] * len(samplers)
        self.twins: list[Floats] = []
        self.failed: dict[int, str] = {}
        self.senseless: set[int] = set()  # of the failed, those that the clock failed
        self.ended = ""
        self.partial = self._cut = False  # whether the last row, the last measurement was cut short
        self.started = clock()
        self._logs = np.full((self.count + 32, 2, len(samplers), self.probes), np.nan)
        if earlier is not None:
            self._logs[: self.count] = earlier
            self._count_earlier()

    def _count_earlier(self) -> None:
        first, second = self.logs[:, 0], self.logs[:, 1]
        twice = np.isfinite(first).all(axis=-1) & (first != second).any(axis=-1)
        self.twins = [first[row, i] - second[row, i] for row, i in np.argwhere(twice)]
        runs = np.isfinite(first).all(axis=-1).sum(axis=0) + twice.sum(axis=0)
        self.samples = [int(n) * self.probes for n in runs]

    @property
    def logs(self) -> Floats:
        return self._logs[: self.count]

    @property
    def complete(self) -> int:
        """Rounds that were run to their end."""
        return self.count - (self.partial and self.count > self.earlier)

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    # --- running -----------------------------------------------------------------------------------------
    def run(self, order: Sequence[int]) -> None:
        """A new round: each candidate in `order` once; who is in it twice, twice."""
        logs = self._measure(order)
        self.partial = self._cut
        if logs is None:
            return
        if self.count == len(self._logs):
            self._logs = np.concatenate([self._logs, np.full_like(self._logs, np.nan)])
        row = self._logs[self.count]
        self.count += 1
        seen: dict[int, int] = {}
        for position, i in enumerate(order):
            if i in self.failed or not np.isfinite(logs[position]).all():
                continue
            if i in seen:
                self.twins.append(logs[seen[i]] - logs[position])
                row[1, i] = logs[position]
            else:
                row[:, i] = logs[position]
            seen[i] = position

    def again(self, order: Sequence[int]) -> None:
        """Run these once more and keep the faster time of each one's last round and this."""
        for i, log in self._more(order):
            row = self._last_row(i)
            row[:, i] = np.fmin(row[:, i], log)

    def confirm(self, i: int) -> None:
        """Run i twice more and keep the middle of the three times."""
        found = [log for _, log in self._more([i, i])]
        if len(found) == 2:
            row = self._last_row(i)
            row[:, i] = np.median([row[0, i], *found], axis=0)

    def _more(self, order: Sequence[int]) -> list[tuple[int, Floats]]:
        logs = self._measure(order)
        if logs is None or self._cut:
            return []
        return [(i, log) for i, log in zip(order, logs, strict=True) if i not in self.failed]

    def _last_row(self, i: int) -> Floats:
        """The last row in which i ran."""
        rows = np.flatnonzero(np.isfinite(self.logs[:, 0, i]).all(axis=-1))
        return np.asarray(self._logs[rows[-1] if len(rows) else self.count - 1])

    def _measure(self, order: Sequence[int]) -> Floats | None:
        """Log seconds [order, probes], nan for who had no time; None if nothing of it is to be kept.

        The one place where a round's times are put together: `combine` makes them the group's.
        """
        flat: list[float] = []
        for i in order:
            flat += [0.0] * self.probes if self._aborted() else self._sample(i)
        flat.append(self._flag(flat))
        if self.combine is not None:
            flat = self.combine(flat)
        flag = flat.pop()
        self.ended = ENDED[flag]
        self._cut = flag == INCOMPLETE
        if self._cut and (self.combine is not None or not any(flat)):
            return None  # ranks have come to different candidates
        times = np.array(flat).reshape(len(order), self.probes)
        for i, finite in zip(order, np.isfinite(times).all(axis=-1), strict=True):
            if not finite:
                self.failed.setdefault(i, "failed on another rank")
        return np.asarray(np.log(np.where(times > 0, times, np.nan)))

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
            seconds = [self._read(sampler) for sampler in self.samplers[i]]
            self.samples[i] += self.probes
        except Exception as error:
            if isinstance(error, ClockError):
                self.senseless.add(i)
            self.failed[i] = f"failed: {type(error).__name__}: {error}"
            return [math.inf] * self.probes
        return seconds

    def _read(self, sampler: Sampler) -> float:
        """A reading that makes sense."""
        readings = []
        for _ in range(READINGS):
            seconds = as_seconds(sampler())
            if 0 < seconds < math.inf:
                return seconds
            readings.append(seconds)
        raise ClockError(f"the clock read {readings} in a row, expected positive seconds")

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

    # --- what they amount to -----------------------------------------------------------------------------
    def evidence(
        self, i: int, default: int, who: tuple[str, Any], probes: Sequence[str], fate: str, reason: str
    ) -> CandidateEvidence:
        """The evidence for candidate i, which is called `who`; `probes` are called that."""
        mine = self.logs[:, :, i].reshape(-1, self.probes)
        mine = mine[np.isfinite(mine).all(axis=-1)]
        runner, tactic = who
        if not len(mine):
            return CandidateEvidence(runner, tactic, fate, self.samples[i], reason=reason)
        middle = np.median(mine, axis=0)
        spread = 1.4826 * np.median(np.abs(mine - middle), axis=0)
        median = np.exp(middle)
        slowest = int(median.argmax())
        ratio, low, high, each = self._ratio(i, default)
        return CandidateEvidence(
            runner,
            tactic,
            fate,
            self.samples[i],
            float(median[slowest]),
            float(spread[slowest] * median[slowest]),
            ratio,
            low,
            high,
            reason,
            {
                name: {"median": float(m), "ratio": r}
                for name, m, r in zip(probes, median, each, strict=False)
            },
        )

    def _ratio(self, i: int, default: int) -> Ratio:
        """(ratio, low, high, per probe) to the default, over the rounds in which both ran."""
        if i == default:
            return 1.0, 1.0, 1.0, (1.0,) * self.probes
        both = self.logs[:, :, [i]] - self.logs[:, :, [default]]
        both = both[np.isfinite(both).all(axis=(1, 2, 3))]
        if not len(both):
            return None, None, None, ()
        if len(both) == 1:
            each = np.exp(both[0, 0, 0])
            return float(each.max()), 0.0, math.inf, tuple(each.tolist())
        gap = gaps(both)
        alpha = (1 - self.policy.confidence) / 2 / self.probes
        width = half_width(gap, alpha, self.policy.resolution)[0]
        middle = gap.location[0]
        low, high = (float(np.exp(min(end.max(), LARGEST_LOG))) for end in (middle - width, middle + width))
        return float(np.exp(middle.max())), low, high, tuple(np.exp(middle).tolist())


Ratio = tuple[float | None, float | None, float | None, tuple[float, ...]]

"""Regret on paper: tunings by the thousand on simulated clocks, with targets that must hold.

Each scenario is a list of true times, a default and a noise model. Three schemes tune it with the same
clocks:
  moestro  the race (moestro.tuning.race.race) under its default policy
  field    what autotuners do: one candidate after the other, 3 warm-ups, the mean of 10, argmin
  equal    interleaved rounds of all candidates to the end, argmin: as many rounds as it takes to be wrong no
           more often than the race. Twice: by the median of the times, and by the race's own statistic
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

from moestro.bench.regret import Pick, Summary, summarise
from moestro.tuning.measure.simulated import SimulatedClock
from moestro.tuning.race.race import race
from moestro.tuning.race.statistics import Floats, gaps
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["SCENARIOS", "Outcome", "Scenario", "Target", "run", "tune_once"]

T = TypeVar("T")

CALL = 1e-3  # seconds of the fastest tactic: virtual, only the ratios matter
MOST_ROUNDS = 256  # of equal sampling
ENOUGH = 500  # tunings from which on a comparison at equal error says something
GRID = (4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, MOST_ROUNDS)


@dataclass(frozen=True)
class Target:
    """What must hold: a field of the race's Summary (or "share_of_equal"), and its limit."""

    what: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    times: tuple[float, ...]  # relative to the fastest
    default: int
    targets: tuple[Target, ...]
    shuffled: bool = (
        False  # the order in which the tactics are listed differs from one pair of tunings to the next
    )
    compare_equal: bool = False
    noise: float = 0.02
    drift: float = 0.05
    outliers: float = 0.01

    def clock(self, seed: int) -> SimulatedClock:
        return SimulatedClock(
            noise=self.noise, drift=self.drift, drift_period=1000 * CALL, outliers=self.outliers, seed=seed
        )

    def order(self, seed: int) -> list[int]:
        """The tactics as they are listed to the tuning of this seed; seeds 2k and 2k + 1 are repetitions."""
        order = list(range(len(self.times)))
        if self.shuffled:
            random.Random(seed // 2).shuffle(order)
        return order

    def pick(self, choice: int, clock: SimulatedClock, noise_floor: float = 0.0) -> Pick:
        time = self.times[choice]
        return Pick(
            choice,
            time / min(self.times) - 1,
            time / self.times[self.default] - 1,
            clock.runs,
            clock.now,
            noise_floor,
        )


@dataclass(frozen=True)
class Outcome:
    """One scenario: a summary per scheme, and (target, value, held) of the race."""

    scenario: Scenario
    summaries: tuple[Summary, ...]
    targets: tuple[tuple[Target, float, bool], ...]
    equal_samples: dict[str, int | None] = field(
        default_factory=dict
    )  # statistic -> samples; None: never enough

    @property
    def held(self) -> bool:
        return all(held for _, _, held in self.targets)


NEVER_SLOWER = Target("slower_than_default", most=0.0)
LADDER = tuple(1 + 0.01 * i for i in range(16))
TIE = tuple(1 + 0.005 * i / 11 for i in range(12))

SCENARIOS = (
    Scenario(
        "ladder",
        "16 tactics at 0, 1, 2 ... 15 % behind the best, in any order",
        LADDER,
        default=15,
        targets=(Target("best_picked", least=0.99), Target("share_of_equal", most=0.35), NEVER_SLOWER),
        shuffled=True,
        compare_equal=True,
    ),
    Scenario(
        "ladder, slowest first",
        "the same, where the tie rule is on the second best's side",
        LADDER[::-1],
        default=0,
        targets=(Target("best_picked", least=0.99), NEVER_SLOWER),
    ),
    Scenario(
        "tie",
        "12 tactics within 0.5 %, fastest first, and a default 10 % behind",
        (*TIE, 1.1),
        default=12,
        targets=(Target("same_pick", least=0.95), NEVER_SLOWER),
    ),
    Scenario(
        "tie, slowest first",
        "the same, where the preferred one is 0.5 % behind the best",
        (*TIE[::-1], 1.1),
        default=12,
        targets=(Target("same_pick", least=0.95), NEVER_SLOWER),
    ),
    Scenario(
        "default 2 % behind",
        "the default is behind the best of two by min_gain exactly",
        (1.02, 1.0),
        default=0,
        targets=(Target("same_pick", least=0.99), NEVER_SLOWER),
    ),
    Scenario(
        "default 2 % behind of 16",
        "the same, with 14 others 0 ... 13 % behind the best",
        (1.02, 1.0, *LADDER[:14]),
        default=0,
        targets=(Target("same_pick", least=0.99), NEVER_SLOWER),
    ),
    Scenario(
        "default best",
        "15 others 0.25 ... 3.75 % behind the default, 5 % noise, 3 % outliers",
        (1.0, *(1 + 0.0025 * i for i in range(1, 16))),
        default=0,
        targets=(Target("same_pick", least=0.99), NEVER_SLOWER),
        noise=0.05,
        outliers=0.03,
    ),
)


def tune_once(scenario: Scenario, seed: int, policy: MeasurementPolicy | None = None) -> Pick:
    """One race."""
    clock, order = scenario.clock(seed), scenario.order(seed)
    samplers = [clock.sampler(CALL * scenario.times[i]) for i in order]
    result = race(samplers, policy, default=order.index(scenario.default), seed=seed)
    return scenario.pick(order[result.winner], clock, result.noise_floor)


def field_once(scenario: Scenario, seed: int) -> Pick:
    """One tuning by the plain scheme of the field."""
    clock = scenario.clock(seed)
    means = {}
    for i in scenario.order(seed):
        seconds = [clock.advance(CALL * scenario.times[i]) for _ in range(13)]
        means[i] = sum(seconds[3:]) / 10
    return scenario.pick(min(means, key=means.__getitem__), clock)


def rounds_of_all(scenario: Scenario, seed: int) -> Floats:
    """Log seconds of interleaved rounds of all candidates, rotated: [MOST_ROUNDS, candidates]."""
    clock, order = scenario.clock(seed), scenario.order(seed)
    table = np.empty((MOST_ROUNDS, len(order)))
    for r, row in enumerate(table):
        shift = r % len(order)
        for i in order[shift:] + order[:shift]:
            row[i] = clock.advance(CALL * scenario.times[i])
    return np.asarray(np.log(table))


def equal_choices(scenario: Scenario, seed: int) -> dict[str, list[int]]:
    """What equal sampling picks after each number of rounds in GRID, by either statistic."""
    logs = rounds_of_all(scenario, seed)
    ratios = logs - np.median(logs, axis=1, keepdims=True)
    by_race = [gaps(ratios[:n, None, :, None].repeat(2, axis=1)).location[:, 0] for n in GRID]
    return {
        "median": [int(np.median(logs[:n], axis=0).argmin()) for n in GRID],
        "race's": [int(location.argmin()) for location in by_race],
    }


def run(
    scenario: Scenario, tunings: int, processes: int = 1, step: Callable[[], None] = lambda: None
) -> Outcome:
    """All schemes on one scenario; `step` is called after every tuning of the race."""
    picks = []
    for pick in _map(functools.partial(tune_once, scenario), tunings, processes):
        picks.append(pick)
        step()
    ours = summarise("moestro", picks)
    plain = summarise("field", list(_map(functools.partial(field_once, scenario), tunings, processes)))
    equal: dict[str, int | None] = {}
    if scenario.compare_equal:
        choices = list(_map(functools.partial(equal_choices, scenario), tunings, processes))
        equal = {name: _rounds_for([c[name] for c in choices], scenario, ours) for name in choices[0]}
    cheapest = min((n for n in equal.values() if n is not None), default=None)
    values = {"share_of_equal": ours.samples / cheapest if cheapest else 0.0}
    targets = []
    for target in scenario.targets:
        if target.what == "share_of_equal" and tunings < ENOUGH:
            continue
        value = values.get(target.what, getattr(ours, target.what, 0.0))
        targets.append((target, value, target.holds(value)))
    return Outcome(scenario, (ours, plain), tuple(targets), equal)


def _rounds_for(choices: Sequence[Sequence[int]], scenario: Scenario, ours: Summary) -> int | None:
    """Samples that equal sampling needs to pick the best as often as the race does."""
    best = int(np.argmin(scenario.times))
    right = (np.array(choices) == best).mean(axis=0)  # per number of rounds
    enough = [n for n, share in zip(GRID, right, strict=True) if share >= ours.best_picked]
    return enough[0] * len(scenario.times) if enough else None


def _map(function: Callable[[int], T], count: int, processes: int) -> Iterator[T]:
    if processes == 1:
        yield from map(function, range(count))
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(function, range(count), chunksize=max(1, min(25, count // processes)))

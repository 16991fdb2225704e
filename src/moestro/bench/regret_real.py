"""Regret on a device: what the tuner picks, tuning after tuning, judged by an interleaved oracle.

For one set of inputs, in this order:
  oracle   every candidate in interleaved rounds, rotated, for as long as `oracle_seconds` says; who is slower
           than the best by `screen_ratio` after three rounds is left out. Ratios are to the default
  moestro  `repeats` tunings, each with a fresh tuner and no store
  field    `repeats` times: one candidate after the other, 3 warm-ups, the mean of 10, argmin
Regret is the oracle's ratio of the choice to the oracle's best. Below two of the oracle's own standard errors
it means nothing, and the choice counts as the best.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.bench.regret import Pick, Summary, summarise
from moestro.errors import TuningError
from moestro.tuning import AutoTuner, MeasurementPolicy, TuningConfig
from moestro.tuning.measure.decide import merged
from moestro.tuning.measure.scope import measured
from moestro.tuning.measure.timers import Timer
from moestro.tuning.race.rounds import Rounds
from moestro.tuning.race.statistics import gaps
from moestro.tuning.spec.inputs import synthesise
from moestro.tuning.spec.keys import shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC

__all__ = ["Case", "Judged", "Oracle", "RealOutcome", "candidates_of", "consult", "judge", "measure_regret"]

LEAST_ROUNDS = 9
SCREENING = 3  # rounds before the oracle leaves out the hopeless

Candidate = tuple[int, Any]  # index of the runner, tactic
Step = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One operation at one size, with one probe, as the tuner is asked for it."""

    op: str
    runners: Sequence[Any]
    config: TuningConfig
    inputs: Sequence[Any]

    def synthesised(self, seed: int) -> list[Any]:
        """The inputs that the tuner measures with at this size."""
        if len(self.config.probes) > 1:
            raise TuningError(f"regret is measured for one probe at a time, got {len(self.config.probes)}")
        shapes = shapes_of(self.inputs)
        profile = self.config.profile(shapes, self.config.sizes(shapes))
        probe = self.config.probes[0] if self.config.probes else None
        return list(synthesise(self.config, profile, self.inputs, probe, seed))


@dataclass(frozen=True)
class Oracle:
    """True ratios to the default, as well as they can be measured here."""

    candidates: tuple[Candidate, ...]  # the default first
    ratios: tuple[float, ...]  # time over the default's; inf: could not be run
    error: float  # standard error of the ratios, the largest of those in the running
    default_seconds: float
    rounds: int
    seconds: float

    @property
    def best(self) -> float:
        return min(self.ratios)


@dataclass(frozen=True)
class Judged:
    """An oracle, what it measured with, and what the timer said of its device around it."""

    oracle: Oracle
    samplers: tuple[Callable[[], float] | None, ...]
    readings: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class RealOutcome:
    oracle: Oracle
    moestro: Summary
    field: Summary
    picks: tuple[str, ...]  # each tuning's choice
    field_picks: tuple[str, ...]
    # What the timer said of its device before and after the load, the oracle and the tunings, as the evidence of a
    # decision has it: {"sm_mhz": [least, most], "throttle": [...]} on a GPU.
    clocks: dict[str, Any] = dataclasses.field(default_factory=dict)


def candidates_of(case: Case) -> list[Candidate]:
    """The default, then every tactic of every runner."""
    shapes = shapes_of(case.inputs)
    profile = case.config.profile(shapes, case.config.sizes(shapes))
    found: list[Candidate] = []
    for index, runner in enumerate(case.runners):
        for tactic in (DEFAULT_TACTIC, *runner.get_valid_tactics(list(case.inputs), profile)):
            if (index, tactic) not in found:
                found.append((index, tactic))
    return found


def measure_regret(
    case: Case,
    timer: Timer,
    policy: MeasurementPolicy,
    *,
    repeats: int = 6,
    oracle_seconds: float = 10.0,
    new_tuner: Callable[[], AutoTuner] | None = None,
    step: Step = lambda what: None,
) -> RealOutcome:
    """Oracle, repeated tunings, and the field's scheme on one case. Raises TuningError for several probes."""
    step("oracle")
    judged = judge(case, timer, policy, oracle_seconds)
    oracle, readings = judged.oracle, [*judged.readings]
    picks, chosen = [], []
    for i in range(repeats):
        step(f"tuning {i + 1} of {repeats}")
        tuner = (
            new_tuner() if new_tuner else AutoTuner(timer=timer, policy=dataclasses.replace(policy, seed=i))
        )
        pick, candidate = _tune(case, tuner, oracle)
        picks.append(pick)
        chosen.append(candidate)
        readings += _reading(timer)
    field, field_chosen = [], []
    for _ in range(repeats):
        step("the field's scheme")
        pick, candidate = _field(judged.samplers, oracle)
        field.append(pick)
        field_chosen.append(candidate)
    return RealOutcome(
        oracle,
        summarise("moestro", picks, 2 * oracle.error),
        summarise("field", field, 2 * oracle.error),
        tuple(_name(case, c) for c in chosen),
        tuple(_name(case, c) for c in field_chosen),
        merged(readings),
    )


def judge(case: Case, timer: Timer, policy: MeasurementPolicy, seconds: float) -> Judged:
    """Consult the oracle on a device under load: policy.sustained_s of it before."""
    inputs = case.synthesised(policy.seed)
    candidates = candidates_of(case)
    for index, runner in enumerate(case.runners):
        if callable(getattr(runner, "reserve", None)):
            runner.reserve(inputs, [tactic for i, tactic in candidates if i == index])
    samplers = _prepare(case, candidates, inputs, timer)
    readings = [*_reading(timer)]
    load(samplers[0], policy, timer)
    readings += _reading(timer)
    oracle = consult(candidates, samplers, policy, seconds)
    readings += _reading(timer)
    return Judged(oracle, tuple(samplers), tuple(readings))


def _reading(timer: Timer) -> list[dict[str, Any]]:
    """What the timer says of its device now, if it says anything."""
    hook = getattr(timer, "conditions", None)
    found = hook() if callable(hook) else None
    return [found] if found else []


def load(sampler: Callable[[], float] | None, policy: MeasurementPolicy, timer: Timer) -> None:
    """Run the default for policy.sustained_s, where the timer's device slows down under load."""
    until = time.perf_counter() + policy.sustained_s
    while sampler is not None and getattr(timer, "sustains", False) and time.perf_counter() < until:
        sampler()


def consult(
    candidates: Sequence[Candidate],
    samplers: Sequence[Callable[[], float] | None],
    policy: MeasurementPolicy,
    seconds: float,
) -> Oracle:
    """Measure all candidates in interleaved rounds; None is one that could not be prepared."""
    lanes = [(sampler or _fails,) for sampler in samplers]
    rounds = Rounds(lanes, dataclasses.replace(policy, max_seconds=None))
    live = [i for i, sampler in enumerate(samplers) if sampler is not None]
    if 0 not in live:
        raise TuningError("the default tactic cannot be measured, so there is nothing to compare with")
    started = time.perf_counter()
    while rounds.count < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        shift = rounds.count % len(live)
        rounds.run(live[shift:] + live[:shift])
        live = [i for i in live if i not in rounds.failed]
        if rounds.count == SCREENING:
            middle = np.median(rounds.logs[:, 0, :, 0], axis=0)
            limit = np.nanmin(middle) + math.log(policy.screen_ratio)
            live = [i for i in live if i == 0 or middle[i] <= limit]
    ratios, error = np.full(len(lanes), np.inf), 0.0
    for i in range(len(lanes)):
        both = rounds.logs[:, :, [i]] - rounds.logs[:, :, [0]]
        both = both[np.isfinite(both).all(axis=(1, 2, 3))]
        if len(both) >= 2:
            gap = gaps(both)
            ratios[i] = math.exp(gap.location[0, 0])
            error = max(error, float(gap.standard_error[0, 0])) if i in live else error
    ratios[0] = 1.0
    default = float(np.exp(np.median(rounds.logs[:, 0, 0, 0])))
    return Oracle(
        tuple(candidates), tuple(ratios.tolist()), error, default, rounds.count, time.perf_counter() - started
    )


def _prepare(
    case: Case, candidates: Sequence[Candidate], inputs: Sequence[Any], timer: Timer
) -> list[Callable[[], float] | None]:
    samplers: list[Callable[[], float] | None] = []
    for index, tactic in candidates:
        runner = case.runners[index]

        def call(runner: Any = runner, tactic: Any = tactic) -> Any:
            return runner.forward(inputs, tactic=tactic)

        try:
            samplers.append(timer.prepare(measured(call)))
        except Exception:  # what a tuner must survive as well; the oracle shows it as unmeasured
            samplers.append(None)
    return samplers


def _tune(case: Case, tuner: AutoTuner, oracle: Oracle) -> tuple[Pick, Candidate]:
    started = time.perf_counter()
    buckets = case.config.sizes(shapes_of(case.inputs))
    with tuner.autotune(True, tuning_buckets=buckets, crossover=False):
        runner, tactic = tuner.choose_one(case.op, case.runners, case.config, case.inputs)
    seconds = time.perf_counter() - started
    decision = tuner.decision(case.op, case.runners, case.config, case.inputs)
    samples = decision.evidence.samples if decision is not None else 0
    floor = decision.evidence.noise_floor if decision is not None else 0.0
    index = next(i for i, r in enumerate(case.runners) if r is runner)
    return _pick((index, tactic), oracle, samples, seconds, floor), (index, tactic)


def _field(samplers: Sequence[Callable[[], float] | None], oracle: Oracle) -> tuple[Pick, Candidate]:
    """One candidate after the other, 3 warm-ups, the mean of 10."""
    started = time.perf_counter()
    means = {}
    for i, sampler in enumerate(samplers):
        if sampler is not None and math.isfinite(oracle.ratios[i]):
            seconds = [sampler() for _ in range(13)]
            means[i] = sum(seconds[3:]) / 10
    best = oracle.candidates[min(means, key=means.__getitem__)]
    return _pick(best, oracle, 13 * len(means), time.perf_counter() - started, 0.0), best


def _pick(candidate: Candidate, oracle: Oracle, samples: int, seconds: float, noise_floor: float) -> Pick:
    choice = oracle.candidates.index(candidate)
    ratio = oracle.ratios[choice]
    # The oracle is uncertain, too: what it cannot tell from the default is not slower than it.
    floor = max(noise_floor, 2 * oracle.error)
    return Pick(choice, ratio / oracle.best - 1, ratio - 1, samples, seconds, floor)


def _name(case: Case, candidate: Candidate) -> str:
    index, tactic = candidate
    runner = case.runners[index]
    label = getattr(runner, "backend", type(runner).__name__)
    return f"{label} {'default' if tactic == DEFAULT_TACTIC else tactic}"


def _fails() -> float:
    raise TuningError("could not be prepared")

"""One decision: every candidate at one bucket, made ready (candidates.py), raced (race.py), and written up.

A race that the budget cuts short leaves an incomplete record with its samples; the next one goes on from there:
who was checked is not checked again, who was eliminated stays so.

Before a race of long calls the device is loaded: a GPU falls from its boost clock after seconds of load (an H100 from
1980 to 1400 MHz), and what won before need not win after. From FROM_SIZE rows on, on a timer that says that its
device slows down so (`sustains`), the default is run for `MeasurementPolicy.sustained_s`, within LOADING of the
bucket's time. A timer's `conditions()` is read before the load, after it and after the race, for the evidence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.measure.candidates import NOTHING_RUNS, Trial
from moestro.tuning.measure.request import Candidate, Job, candidate_name, evidence_name, record_name
from moestro.tuning.measure.scope import measured
from moestro.tuning.race.race import RaceResult, race
from moestro.tuning.race.rounds import ClockError, Combine, Samples, as_seconds
from moestro.tuning.spec.evidence import CandidateEvidence, Evidence, Record
from moestro.tuning.spec.runner import DEFAULT_TACTIC, stored_tactic
from moestro.tuning.spec.specs import Sizes

__all__ = ["conclude", "measure", "merged", "nothing_yet", "race_of", "samplers_of", "without_choice"]

FOR_WARM_UP = 0.5  # of a bucket's time, checks included: the rest is for the race
FROM_SIZE = 1024  # rows: shorter calls do not load the device
LOADING = 0.25  # of a bucket's time, for the load: the rest is for the checks and the race
WILD = 100.0  # times the smallest reading: more is not taken for time that has passed


def measure(
    job: Job,
    bucket: Sizes,
    *,
    preferred: Record | None = None,
    only: Sequence[Record] | None = None,
    deadline: float = float("inf"),
    unfinished: Record | None = None,
) -> Record | None:
    """The decision for a bucket; None if the time was over before anything was learned.

    preferred: the neighbour's decision, which wins ties. only: race these decisions' candidates and the
    default. deadline: job.budget.spent at which to stop. unfinished: what an earlier tuning came to. Raises
    OutOfMemoryError if no candidate fits, TuningError if the clock makes no sense.
    """
    trial = Trial(job, bucket, deadline, unfinished)
    try:
        return _measured(trial, preferred, only)
    finally:
        if job.statics is not None:
            job.statics.put_back()


def _measured(trial: Trial, preferred: Record | None, only: Sequence[Record] | None) -> Record | None:
    sound = trial.fit(trial.candidates(only))
    if not sound and not trial.late:
        sound = trial.fit(trial.spare)
    fit, samplers = samplers_of(trial, sound)
    if trial.late and len(fit) < 2:
        return nothing_yet(trial)
    if len(fit) < 2:
        return without_choice(trial, fit)
    try:
        result = race_of(trial, fit, samplers, preferred)
    except ClockError as error:
        raise TuningError(f"the timer {trial.job.timer.name!r} cannot time anything: {error}") from error
    except TuningError as error:  # every candidate failed while it was timed
        for candidate in fit:
            trial.fail(candidate, error)
        return without_choice(trial, [])
    return conclude(trial, fit, result) if trial.intact(fit) else None


def race_of(
    trial: Trial,
    fit: list[Candidate],
    samplers: list[list[Callable[[], float]]],
    preferred: Record | None,
    combine: Combine | None = None,
) -> RaceResult:
    """The race among `fit`; combine: of a group of ranks, whose races begin anew."""
    job = trial.job
    if combine is None:  # ranks would run it unequally often, and an operation may wait for all of them
        _load(trial, samplers[0])
    names = [candidate.name for candidate in fit]
    wanted = record_name(preferred) if preferred is not None else None
    earlier = trial.samples.table(names, len(trial.inputs)) if trial.samples.rounds and not combine else None
    result = race(
        samplers,
        job.policy,
        default=0,
        preferred=names.index(wanted) if wanted in names else None,
        stop=lambda: trial.late,
        abort=lambda: job.budget.left <= 0,
        who=[(c.runner, stored_tactic(c.tactic)) for c in fit],
        probes=job.probe_names or ("default",),
        earlier=earlier,
        combine=combine,
    )
    _read_conditions(trial)
    return result


def samplers_of(
    trial: Trial, sound: list[Candidate]
) -> tuple[list[Candidate], list[list[Callable[[], float]]]]:
    """(candidates that the timer could prepare, their samplers, one a probe)."""
    fit: list[Candidate] = []
    samplers: list[list[Callable[[], float]]] = []
    for candidate in sound:
        if trial.late or (len(fit) > 1 and trial.past(FOR_WARM_UP)):
            trial.skip(candidate, "checked")
            continue
        try:
            samplers.append([_sampler(trial, candidate, inputs) for inputs in trial.inputs])
            fit.append(candidate)
        except Exception as error:
            trial.fail(candidate, error)
    return fit, samplers


def _sampler(trial: Trial, candidate: Candidate, inputs: Sequence[Any]) -> Callable[[], float]:
    job = trial.job
    sample = job.timer.prepare(measured(functools.partial(job.run, candidate, inputs)))

    def sampler() -> float:
        seconds = as_seconds(sample())
        if 0 < seconds < math.inf:  # a wild reading must not eat the budget
            if trial.shortest < math.inf:
                job.budget.sampled(min(seconds, WILD * trial.shortest))
            trial.shortest = min(trial.shortest, seconds)
        return seconds

    return sampler


def nothing_yet(trial: Trial) -> Record | None:
    """What to keep where time was over before a race: that the default takes longer than there was time."""
    if not trial.default_outlasts:
        return None
    runner = trial.job.key.runners[0]
    default = Candidate(0, runner, DEFAULT_TACTIC, candidate_name(runner, DEFAULT_TACTIC))
    evidence = [trial.slow_default(), *(e for e in trial.evidence if evidence_name(e) != default.name)]
    found = dataclasses.replace(_evidence(trial, "budget"), candidates=tuple(evidence))
    return _record(trial, default, "default", found, complete=False)


def without_choice(trial: Trial, fit: list[Candidate]) -> Record:
    """The decision where there is one candidate, or none: remembered, so that nobody tries again."""
    runner = trial.job.key.runners[0]
    winner = fit[0] if fit else Candidate(0, runner, DEFAULT_TACTIC, candidate_name(runner, DEFAULT_TACTIC))
    why = "the only one left" if fit else NOTHING_RUNS
    fate = CandidateEvidence(winner.runner, stored_tactic(winner.tactic), "winner", reason=why)
    others = [e for e in trial.evidence if evidence_name(e) != winner.name]
    bad = any(e.fate == "quarantined" or trial.has_raised(e) for e in others)
    found = dataclasses.replace(_evidence(trial, why), candidates=(fate, *others))
    return _record(
        trial, winner, "quarantined" if bad else "default", found, complete=not trial.default_may_recover
    )


def conclude(trial: Trial, fit: list[Candidate], result: RaceResult) -> Record | None:
    """The decision that a race among `fit` came to; None if it taught nothing."""
    if result.rounds < 1 and not result.samples:
        return None
    for found in result.candidates:
        if found.fate == "failed":
            trial.evidence.append(trial.job.failed_in_race(found))
        else:
            trial.evidence.append(found)
    winner, ended = fit[result.winner], result.ended
    raced = result.rounds >= 2 or ended == "decided"
    if trial.default_outlasts:
        trial.evidence.append(trial.slow_default())
        won = result.candidates[result.winner]
        if won.median is None or won.median * (1 + trial.job.policy.min_gain) > trial.default_seconds:
            raced = False
    evidence = dataclasses.replace(
        _evidence(trial, ended), noise_floor=result.noise_floor, samples=result.samples
    )
    cut = ended == "budget" or any(e.fate == "not measured" for e in trial.evidence)
    samples = trial.samples.with_table([c.name for c in fit], result.logs) if cut else Samples()
    if not raced:
        runner = trial.job.key.runners[0]
        winner = Candidate(0, runner, DEFAULT_TACTIC, candidate_name(runner, DEFAULT_TACTIC))
    record = _record(
        trial,
        winner,
        "measured" if raced else "default",
        evidence,
        complete=not cut and not trial.default_may_recover,
    )
    return dataclasses.replace(record, samples=dict(samples.rows))


def _evidence(trial: Trial, reason: str) -> Evidence:
    job = trial.job
    return Evidence(
        tuple(trial.evidence),
        seconds=job.budget.spent - trial.started + trial.seconds_before,
        clock=job.timer.name,
        policy=dataclasses.asdict(job.policy),
        reason=reason,
        conditions=_conditions(trial),
    )


def _record(
    trial: Trial, winner: Candidate, status: str, evidence: Evidence, complete: bool = True
) -> Record:
    return Record(
        bucket=trial.bucket,
        runner=winner.runner,
        tactic=stored_tactic(winner.tactic),
        status=status,
        probes=trial.job.probe_names,
        complete=complete,
        created=time.time(),
        evidence=evidence,
        default=trial.resolved_default,
    )


# --- the device -------------------------------------------------------------------------------------------------
def _load(trial: Trial, default: Sequence[Callable[[], float]]) -> None:
    """Run the default's samplers, in turn, until the device has been loaded as the policy says."""
    job = trial.job
    _read_conditions(trial)
    wanted = job.policy.sustained_s
    if not wanted or not getattr(job.timer, "sustains", False) or max(trial.bucket, default=0) < FROM_SIZE:
        return
    start, most = job.budget.spent, min(wanted, LOADING * trial.time)
    loaded = 0.0
    while loaded < most and not trial.late:
        for sampler in default:
            seconds = sampler()
            job.budget.sampled(seconds if math.isfinite(seconds) and seconds > 0 else 0.0)
        loaded = job.budget.spent - start
    trial.loaded_s = loaded
    _read_conditions(trial)


def _read_conditions(trial: Trial) -> None:
    """Note what the timer says of its device now, if it says anything."""
    hook = getattr(trial.job.timer, "conditions", None)
    found = hook() if callable(hook) else None
    if found:
        trial.conditions.append(found)


def _conditions(trial: Trial) -> dict[str, Any]:
    """The trial's readings as evidence keeps them, and the seconds of load before."""
    found = merged(trial.conditions)
    if trial.loaded_s:
        found["loaded_s"] = round(trial.loaded_s, 3)
    return found


def merged(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several readings in one: numbers as [least, most], lists as all that was in one."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for reading in readings for name in reading):
        values = [v for reading in readings if (v := reading.get(name)) is not None]
        if values and all(isinstance(v, int | float) for v in values):
            found[name] = [min(values), max(values)]
        elif values and all(isinstance(v, list | tuple) for v in values):
            found[name] = sorted({str(one) for v in values for one in v})
        else:
            found[name] = values[-1] if values else None
    return found

"""One decision: every candidate at one bucket, made ready (trial.py), raced (race.py), and written up."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.measure.candidates import Trial
from moestro.tuning.measure.request import Candidate, Job, candidate_name, names_out_of_memory, record_name
from moestro.tuning.measure.scope import measured
from moestro.tuning.race.race import CandidateEvidence as Raced
from moestro.tuning.race.race import RaceResult, race
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.records import CandidateEvidence, Evidence, Record

__all__ = ["conclude", "measure", "samplers_of", "without_choice"]

FOR_WARM_UP = 0.5  # of a bucket's time, checks included: the rest is for the race


def measure(
    job: Job,
    bucket: Sizes,
    *,
    preferred: Record | None = None,
    only: Sequence[Record] | None = None,
    deadline: float = float("inf"),
) -> Record | None:
    """The decision for a bucket; None if the time was over before anything was learned.

    preferred: the neighbour's decision, which wins ties. only: race these decisions' candidates and the
    default. deadline: job.budget.spent at which to stop. Raises OutOfMemoryError if no candidate fits.
    """
    trial = Trial(job, bucket, deadline)
    sound = trial.fit(trial.candidates(only))
    if not sound and not trial.late:
        sound = trial.fit(trial.spare)
    fit, samplers = samplers_of(trial, sound)
    if trial.late and len(fit) < 2:
        return None
    if len(fit) < 2:
        return without_choice(trial, fit)
    wanted = record_name(preferred) if preferred is not None else None
    names = [candidate.name for candidate in fit]
    try:
        result = race(
            samplers,
            job.policy,
            default=0,
            preferred=names.index(wanted) if wanted in names else None,
            stop=lambda: trial.late,
            abort=lambda: job.budget.left <= 0,
        )
    except TuningError as error:  # every candidate failed while it was timed
        trial.evidence += [job.failed(candidate, error) for candidate in fit]
        return without_choice(trial, [])
    return conclude(trial, fit, result)


def samplers_of(
    trial: Trial, sound: list[Candidate]
) -> tuple[list[Candidate], list[list[Callable[[], float]]]]:
    """(candidates that the timer could prepare, their samplers, one a probe)."""
    fit: list[Candidate] = []
    samplers: list[list[Callable[[], float]]] = []
    for candidate in sound:
        if trial.late or (len(fit) > 1 and trial.past(FOR_WARM_UP)):
            trial.skip(candidate)
            continue
        try:
            samplers.append([_sampler(trial.job, candidate, inputs) for inputs in trial.inputs])
            fit.append(candidate)
        except Exception as error:
            trial.evidence.append(trial.job.failed(candidate, error))
    return fit, samplers


def _sampler(job: Job, candidate: Candidate, inputs: Sequence[Any]) -> Callable[[], float]:
    sample = job.timer.prepare(measured(functools.partial(job.run, candidate, inputs)))

    def sampler() -> float:
        seconds = float(sample())
        job.budget.sampled(seconds)
        return seconds

    return sampler


def without_choice(trial: Trial, fit: list[Candidate]) -> Record:
    """The decision where there is one candidate, or none: remembered, so that nobody tries again."""
    job, runner = trial.job, trial.job.key.runners[0]
    winner = fit[0] if fit else Candidate(0, runner, DEFAULT_TACTIC, candidate_name(runner, DEFAULT_TACTIC))
    why = "the only one left" if fit else "nothing runs; this is the default"
    fate = CandidateEvidence(winner.runner, winner.tactic, "winner", reason=why)
    others = [e for e in trial.evidence if (e.runner, e.tactic) != (winner.runner, winner.tactic)]
    found = Evidence(
        (fate, *others),
        seconds=job.budget.spent - trial.started,
        clock=job.timer.name,
        policy=dataclasses.asdict(job.policy),
        reason=why,
    )
    return _record(trial, winner, "quarantined" if job.banned else "default", found)


def conclude(trial: Trial, fit: list[Candidate], result: RaceResult) -> Record | None:
    """The decision that a race among `fit` came to; None if it ended before its second round."""
    if result.rounds < 2 and result.ended != "decided":
        return None
    job = trial.job
    for i, (candidate, raced) in enumerate(zip(fit, result.candidates, strict=True)):
        fate = "finalist" if raced.left_at is None else "eliminated"
        if i == result.winner:
            fate = "winner"
        elif raced.reason.startswith("failed"):
            fate = "failed" if names_out_of_memory(raced.reason) else "quarantined"
            if fate == "quarantined":
                job.ban(candidate, raced.reason)
        trial.evidence.append(_evidence(job, candidate, fate, raced))
    found = Evidence(
        tuple(trial.evidence),
        result.noise_floor,
        result.samples,
        job.budget.spent - trial.started,
        job.timer.name,
        dataclasses.asdict(job.policy),
        result.ended,
    )
    cut = result.ended == "budget" or any(e.fate == "not measured" for e in trial.evidence)
    return _record(trial, fit[result.winner], "measured", found, complete=not cut)


def _evidence(job: Job, candidate: Candidate, fate: str, raced: Raced) -> CandidateEvidence:
    names = job.probe_names or ("default",)
    probes = {
        name: {"median": median, "ratio": ratio}
        for name, median, ratio in zip(names, raced.median, raced.probe_ratios, strict=False)
    }
    return CandidateEvidence(
        candidate.runner,
        candidate.tactic,
        fate,
        raced.samples,
        max(raced.median, default=None),
        max((s * m for s, m in zip(raced.spread, raced.median, strict=True)), default=None),
        raced.ratio,
        raced.ratio_low,
        raced.ratio_high,
        raced.reason,
        probes,
    )


def _record(
    trial: Trial, winner: Candidate, status: str, evidence: Evidence, complete: bool = True
) -> Record:
    return Record(
        bucket=trial.bucket,
        runner=winner.runner,
        tactic=_tuples(winner.tactic),
        status=status,
        probes=trial.job.probe_names,
        complete=complete,
        created=time.time(),
        evidence=evidence,
    )


def _tuples(tactic: Any) -> Any:
    """A tactic as it comes back from the store: lists are tuples."""
    return tuple(map(_tuples, tactic)) if type(tactic) in {list, tuple} else tactic

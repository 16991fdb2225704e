"""One decision: every candidate at one bucket, under the same conditions, raced.

In this order, and for all candidates before the next step: inputs for each probe; outputs and workspaces for
the largest (`reserve`, `do_preparation`); compilation, in parallel; one run each, compared with the default's
output; the race. A candidate that raises or is wrong goes into quarantine; one that runs out of memory is out
at this bucket only.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moestro.tuning.context import Budget
from moestro.tuning.decisions import CandidateEvidence, Evidence, Record
from moestro.tuning.keys import StaticKey, shapes_of
from moestro.tuning.policy import MeasurementPolicy
from moestro.tuning.precompile import precompile
from moestro.tuning.race import RaceResult, race
from moestro.tuning.runner import DEFAULT_TACTIC, tactic_key
from moestro.tuning.scope import measured
from moestro.tuning.specs import OptimizationProfile, Probe, Sizes, TuningConfig
from moestro.tuning.synth import synthesise
from moestro.tuning.timers import Timer
from moestro.tuning.verify import Reference

__all__ = ["Candidate", "Job", "OutOfMemoryError", "measure"]


@dataclass(frozen=True)
class Candidate:
    """One runner with one tactic. `name` identifies it in quarantine and evidence."""

    index: int  # of the runner
    runner: str
    tactic: Any
    name: str


@dataclass
class Job:
    """What is being tuned, for whom, and how."""

    key: StaticKey
    runners: Sequence[Any]
    config: TuningConfig
    inputs: Sequence[Any]
    kwargs: Mapping[str, Any]
    policy: MeasurementPolicy
    timer: Timer
    budget: Budget
    sizes: Sizes
    banned: dict[str, str]  # candidates in quarantine, with the reason
    ban: Callable[[Candidate, str], None] = lambda candidate, reason: None
    warm: Sequence[Record] = ()
    progress: Callable[[str], None] = lambda text: None
    _prepared: bool = field(default=False, repr=False)

    @property
    def probes(self) -> tuple[Probe | None, ...]:
        return self.config.probes or (None,)

    @property
    def probe_names(self) -> tuple[str, ...]:
        return tuple(probe.name for probe in self.config.probes)


class OutOfMemoryError(Exception):
    """No candidate fits into memory at a bucket."""


class WrongOutputError(Exception):
    """A candidate's output is not the reference's."""


def measure(
    job: Job,
    bucket: Sizes,
    *,
    preferred: Record | None = None,
    only: Sequence[Record] | None = None,
    deadline: float = float("inf"),
) -> Record | None:
    """The decision for a bucket; None if the budget ended before anything was learned.

    preferred: the neighbour's decision, which wins ties. only: race these decisions' candidates and the
    default. deadline: job.budget.spent at which to stop. Raises OutOfMemoryError if no candidate fits.
    """
    attempt = _Attempt(job, bucket, deadline)
    evidence: list[CandidateEvidence] = []
    sound = attempt.prepare(attempt.candidates(only), evidence)
    if sound is None:
        return None
    if len(sound) > 1:
        return attempt.race(sound, evidence, preferred)
    return None if attempt.late else attempt.without_choice(sound, evidence)


class _Attempt:
    def __init__(self, job: Job, bucket: Sizes, deadline: float) -> None:
        self.job, self.bucket, self.deadline = job, bucket, deadline
        self.profile: OptimizationProfile = job.config.profile(shapes_of(job.inputs), bucket)
        self.inputs = [
            synthesise(job.config, self.profile, job.inputs, probe, job.policy.seed) for probe in job.probes
        ]
        self.started = job.budget.spent

    @property
    def late(self) -> bool:
        return self.job.budget.spent >= self.deadline or self.job.budget.left <= 0

    # --- who takes part ------------------------------------------------------------------------------
    def candidates(self, only: Sequence[Record] | None) -> list[Candidate]:
        """The default first, then every runner's tactics, warm ones first; without those in quarantine."""
        found: dict[str, Candidate] = {}
        for index, runner in enumerate(self.job.runners):
            for tactic in (DEFAULT_TACTIC, *runner.get_valid_tactics(self.inputs[0], self.profile)):
                name = candidate_name(self.job.key.runners[index], tactic_key(tactic, runner))
                found.setdefault(name, Candidate(index, self.job.key.runners[index], tactic, name))
        default, *others = found.values()
        if only is not None:
            wanted = {record_name(record) for record in only}
            others = [c for c in others if c.name in wanted]
        warm = {record_name(record) for record in self.job.warm}
        others.sort(key=lambda c: c.name not in warm)
        return [c for c in (default, *others) if c.name not in self.job.banned]

    # --- before the race -----------------------------------------------------------------------------
    def prepare(
        self, candidates: list[Candidate], evidence: list[CandidateEvidence]
    ) -> list[Candidate] | None:
        """Those that are fit to be timed, the reference (the default if it runs) first; None if time is up.

        The others go into the evidence. Raises OutOfMemoryError if not one of them fits.
        """
        self._reserve(candidates)
        broken = self._compile(candidates)
        if self.late:
            return None
        candidates = [c for c in candidates if c.name not in broken]
        evidence += broken.values()
        if not self.job.policy.verify:
            return candidates
        references: list[Reference] | None = None
        sound = []
        for candidate in candidates:
            if self.late and sound:
                evidence.append(CandidateEvidence(candidate.runner, candidate.tactic, "not measured"))
                continue
            try:
                if references is None:
                    references = self._references(candidate)
                else:
                    self._check(candidate, references)
                sound.append(candidate)
            except Exception as error:
                evidence.append(self._broken(candidate, error))
        if not sound and any(e.reason == OUT_OF_MEMORY for e in evidence):
            raise OutOfMemoryError(f"none of {len(candidates)} candidates fits")
        return sound

    def _reserve(self, candidates: list[Candidate]) -> None:
        for index, runner in enumerate(self.job.runners):
            tactics = [c.tactic for c in candidates if c.index == index]
            if not tactics:
                continue
            for inputs in self.inputs:
                if callable(getattr(runner, "reserve", None)):
                    runner.reserve(inputs, tactics)
                if "do_preparation" in inspect.signature(runner.forward).parameters:
                    _run(runner, inputs, DEFAULT_TACTIC, {**self.job.kwargs, "do_preparation": True})

    def _compile(self, candidates: list[Candidate]) -> dict[str, CandidateEvidence]:
        """What could not be compiled, of the candidates whose runner has a `compile` hook."""
        hooks = {c.name: getattr(self.job.runners[c.index], "compile", None) for c in candidates}
        jobs = {
            c.name: functools.partial(hook, self.inputs[0], c.tactic)
            for c in candidates
            if callable(hook := hooks[c.name])
        }
        failed = precompile(
            jobs,
            lambda: self.late,
            lambda done, of: self.job.progress(f"bucket {self.bucket}: compiled {done}/{of}"),
        )
        return {c.name: self._broken(c, failed[c.name]) for c in candidates if c.name in failed}

    def _references(self, candidate: Candidate) -> list[Reference]:
        """What the candidate, which is to be the reference, gives for each probe."""
        hook = getattr(self.job.runners[candidate.index], "tolerance", None)
        references = []
        for inputs in self.inputs:
            written = [i for i in range(len(inputs)) if self.profile.is_dynamic(i)]
            tolerance = functools.partial(hook, inputs) if callable(hook) else None
            references.append(Reference(self._call(candidate, inputs), inputs, written, tolerance))
        return references

    def _check(self, candidate: Candidate, references: list[Reference]) -> None:
        """Raise WrongOutputError if the candidate's output is not the reference's for some probe."""
        for inputs, reference in zip(self.inputs, references, strict=True):
            why = reference.why_wrong(self._call(candidate, inputs))
            if why is not None:
                raise WrongOutputError(why)

    def _call(self, candidate: Candidate, inputs: Sequence[Any]) -> Callable[[], Any]:
        runner, tactic, kwargs = self.job.runners[candidate.index], candidate.tactic, self.job.kwargs
        return lambda: _run(runner, inputs, tactic, kwargs)

    # --- the race ------------------------------------------------------------------------------------
    def without_choice(self, sound: list[Candidate], evidence: list[CandidateEvidence]) -> Record:
        """The decision where there is one candidate, or none: remembered, so that nobody tries again."""
        index, runner = 0, self.job.key.runners[0]
        winner = sound[0] if sound else Candidate(index, runner, DEFAULT_TACTIC, "")
        fate = CandidateEvidence(
            winner.runner, winner.tactic, "winner", reason="alone" if sound else "all failed"
        )
        banned = [c for c in self.job.banned if c.partition(" ")[0] in self.job.key.runners]
        status = "quarantined" if banned else "default"
        found = Evidence(
            (fate, *evidence), clock=self.job.timer.name, policy=dataclasses.asdict(self.job.policy)
        )
        return self.record(winner, status, found, complete=True)

    def race(
        self, sound: list[Candidate], evidence: list[CandidateEvidence], preferred: Record | None
    ) -> Record | None:
        """Time them against each other; the first is who must be beaten."""
        fit, samplers = [], []
        for candidate in sound:
            if self.late:
                break
            try:
                samplers.append([self._sampler(candidate, inputs) for inputs in self.inputs])
                fit.append(candidate)
            except Exception as error:
                evidence.append(self._broken(candidate, error))
        if not fit:
            return None if self.late else self.without_choice([], evidence)
        wanted = record_name(preferred) if preferred is not None else None
        names = [c.name for c in fit]
        result = race(
            samplers,
            self.job.policy,
            default=0,
            preferred=names.index(wanted) if wanted in names else None,
            stop=lambda: self.late,
            abort=lambda: self.job.budget.left <= 0,
        )
        return self._conclude(fit, evidence, result)

    def _sampler(self, candidate: Candidate, inputs: Sequence[Any]) -> Callable[[], float]:
        sample = self.job.timer.prepare(measured(self._call(candidate, inputs)))

        def sampler() -> float:
            seconds = float(sample())
            self.job.budget.sampled(seconds)
            return seconds

        return sampler

    def _broken(self, candidate: Candidate, error: Exception) -> CandidateEvidence:
        if is_out_of_memory(error):
            return CandidateEvidence(candidate.runner, candidate.tactic, "failed", reason=OUT_OF_MEMORY)
        why = str(error) if isinstance(error, WrongOutputError) else f"{type(error).__name__}: {error}"
        self.job.ban(candidate, why)
        return CandidateEvidence(candidate.runner, candidate.tactic, "quarantined", reason=why)

    def _conclude(
        self, fit: list[Candidate], evidence: list[CandidateEvidence], result: RaceResult
    ) -> Record | None:
        if result.rounds < 2 and result.ended != "decided":
            return None
        for i, (candidate, found) in enumerate(zip(fit, result.candidates, strict=True)):
            fate = "finalist" if found.left_at is None else "eliminated"
            if found.reason.startswith("failed"):
                fate = "failed" if is_out_of_memory_text(found.reason) else "quarantined"
                if fate == "quarantined":
                    self.job.ban(candidate, found.reason)
            evidence.append(
                CandidateEvidence(
                    candidate.runner,
                    candidate.tactic,
                    "winner" if i == result.winner else fate,
                    found.samples,
                    max(found.median, default=None),
                    max((s * m for s, m in zip(found.spread, found.median, strict=True)), default=None),
                    found.ratio,
                    found.ratio_low,
                    found.ratio_high,
                    found.reason,
                    self._by_probe(found.median, found.probe_ratios),
                )
            )
        whole = Evidence(
            tuple(evidence),
            result.noise_floor,
            result.samples,
            self.job.budget.spent - self.started,
            self.job.timer.name,
            dataclasses.asdict(self.job.policy),
            result.ended,
        )
        whole_race = result.ended != "budget" and all(c.fate != "not measured" for c in evidence)
        return self.record(fit[result.winner], "measured", whole, complete=whole_race)

    def _by_probe(self, medians: Sequence[float], ratios: Sequence[float]) -> dict[str, dict[str, float]]:
        names = self.job.probe_names or ("default",)
        return {
            name: {"median": median, "ratio": ratio}
            for name, median, ratio in zip(names, medians, ratios, strict=False)
        }

    def record(self, winner: Candidate, status: str, evidence: Evidence, complete: bool) -> Record:
        return Record(
            bucket=self.bucket,
            runner=winner.runner,
            tactic=winner.tactic if not isinstance(winner.tactic, list) else _tuple(winner.tactic),
            status=status,
            probes=self.job.probe_names,
            complete=complete,
            created=time.time(),
            evidence=evidence,
        )


OUT_OF_MEMORY = "out of memory"


def candidate_name(runner: str, tactic: Any) -> str:
    """What a candidate is called in quarantine: its runner and its tactic as JSON."""
    return f"{runner} {json.dumps(tactic, sort_keys=True)}"


def record_name(record: Record) -> str:
    """The candidate that a record chose."""
    return candidate_name(record.runner, tactic_key(record.tactic, None))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    return isinstance(error, MemoryError) or is_out_of_memory_text(f"{type(error).__name__}: {error}")


def is_out_of_memory_text(text: str) -> bool:
    return "OutOfMemoryError" in text or "out of memory" in text or "MemoryError" in text


def _run(runner: Any, inputs: Sequence[Any], tactic: Any, kwargs: Mapping[str, Any]) -> Any:
    call = runner if callable(runner) else runner.forward
    return call(inputs, tactic=tactic, **kwargs)


def _tuple(tactic: Any) -> Any:
    return tuple(_tuple(v) for v in tactic) if isinstance(tactic, list) else tactic

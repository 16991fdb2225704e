"""Before the race at one bucket: who takes part, under the same conditions, and is fit to be timed.

For all candidates before the next step: inputs for each probe; outputs and workspaces for the largest of them
(`reserve`, `do_preparation`); compilation, in parallel; with `isolate`, one run in a child process that may
crash or hang; one run each, compared with the default's output.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from moestro.tuning.measure.check import Reference
from moestro.tuning.measure.compile import precompile
from moestro.tuning.measure.inputs import synthesise
from moestro.tuning.measure.request import (
    OUT_OF_MEMORY,
    Candidate,
    Job,
    OutOfMemoryError,
    UnfitError,
    candidate_name,
    names_out_of_memory,
    record_name,
)
from moestro.tuning.measure.sandbox import Sandbox
from moestro.tuning.spec.keys import shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.records import CandidateEvidence, Record

__all__ = ["Trial"]

FOR_CHECKS = (
    0.25  # of a bucket's time: what is not checked by then does not take part, so that a race is left
)


class Trial:
    """Candidates at one bucket. `evidence` grows by those that are not fit; `inputs` has one list a probe.

    deadline: job.budget.spent at which to stop. Raises OutOfMemoryError if the inputs do not fit.
    """

    def __init__(self, job: Job, bucket: Sizes, deadline: float) -> None:
        self.job, self.bucket, self.deadline = job, bucket, deadline
        self.started = job.budget.spent
        self._time = min(deadline - self.started, job.budget.left)
        self.evidence: list[CandidateEvidence] = []
        self.spare: list[Candidate] = []  # of last resort: for where nothing else runs
        self.profile = job.config.profile(shapes_of(job.inputs), bucket)
        try:
            self.inputs = [
                synthesise(job.config, self.profile, job.inputs, probe, job.policy.seed)
                for probe in job.probes
            ]
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or names_out_of_memory(f"{type(error).__name__}: {error}"):
                raise OutOfMemoryError("the inputs do not fit") from error
            raise

    @property
    def late(self) -> bool:
        """Whether the time for this bucket is over."""
        return self.job.budget.spent >= self.deadline or self.job.budget.left <= 0

    def past(self, share: float) -> bool:
        """Whether more than this share of the time is over: what it was meant for must end."""
        return self.job.budget.spent - self.started > share * self._time

    def candidates(self, only: Sequence[Record] | None) -> list[Candidate]:
        """The default first, then every runner's tactics, warm ones first; without those in quarantine.

        Those of runners that are only a last resort go to `spare`, unless there is no other.
        """
        found: dict[str, Candidate] = {}
        last = {i for i, runner in enumerate(self.job.runners) if _is_last_resort(runner, self.inputs[0])}
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
        for c in others:
            if c.name in self.job.banned:
                reason = self.job.banned[c.name]
                self.evidence.append(CandidateEvidence(c.runner, c.tactic, "quarantined", reason=reason))
        fit = [c for c in (default, *others) if c.name not in self.job.banned]
        first = [c for c in fit if c.index not in last]
        self.spare = [c for c in fit if c.index in last] if first else []
        return first or fit

    def fit(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that are fit to be timed, the reference first: the default, or else the first one that runs.

        Raises OutOfMemoryError if not one of them fits into memory.
        """
        self.reserve(candidates)
        for step in (self._compiled, self._surviving, self._verified):
            candidates = step(candidates)
        if not candidates and any(e.reason == OUT_OF_MEMORY for e in self.evidence):
            raise OutOfMemoryError("no candidate fits")
        return candidates

    def skip(self, candidate: Candidate) -> None:
        """Note that there was no time for a candidate."""
        self.evidence.append(CandidateEvidence(candidate.runner, candidate.tactic, "not measured"))

    def reserve(self, candidates: list[Candidate]) -> None:
        """Outputs and workspaces for the largest of the candidates, before any of them is timed."""
        for index, runner in enumerate(self.job.runners):
            tactics = [c.tactic for c in candidates if c.index == index]
            if not tactics:
                continue
            default = Candidate(index, self.job.key.runners[index], DEFAULT_TACTIC, "")
            for inputs in self.inputs:
                if callable(getattr(runner, "reserve", None)):
                    runner.reserve(inputs, tactics)
                if "do_preparation" in inspect.signature(runner.forward).parameters:
                    self.job.run(default, inputs, do_preparation=True)

    def _compiled(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that can be compiled, where their runner has a `compile` hook."""
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
        self.evidence += [self.job.failed(c, failed[c.name]) for c in candidates if c.name in failed]
        return [c for c in candidates if c.name not in failed]

    def _surviving(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that run once in a child process, with the last probe's inputs."""
        if not self.job.policy.isolate:
            return candidates
        alive = []
        loaded = -1
        with Sandbox(self.job.policy.time_limit) as box:
            for candidate in candidates:
                if self.late:
                    self.skip(candidate)
                    continue
                if loaded != candidate.index:
                    box.load(self.job.runners[candidate.index], self.inputs[-1], self.job.kwargs)
                    loaded = candidate.index
                why = box.check(candidate.tactic)
                if why is None:
                    alive.append(candidate)
                else:
                    self.evidence.append(self.job.failed(candidate, UnfitError(why)))
        return alive

    def _verified(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that run and give what the first one that runs gives."""
        if not self.job.policy.verify:
            return candidates
        references: list[Reference] | None = None
        sound: list[Candidate] = []
        for candidate in candidates:
            if self.late or (len(sound) > 1 and self.past(FOR_CHECKS)):
                self.skip(candidate)
                continue
            try:
                if references is None:
                    references = self._references(candidate)
                else:
                    self._compare(candidate, references)
                sound.append(candidate)
            except Exception as error:
                self.evidence.append(self.job.failed(candidate, error))
        return sound

    def _references(self, candidate: Candidate) -> list[Reference]:
        """What the candidate, which is to be the reference, gives for each probe."""
        hook = getattr(self.job.runners[candidate.index], "tolerance", None)
        references = []
        for inputs in self.inputs:
            written = [i for i in range(len(inputs)) if self.profile.is_dynamic(i)]
            tolerance = functools.partial(hook, inputs) if callable(hook) else None
            run = functools.partial(self.job.run, candidate, inputs)
            references.append(Reference(run, inputs, written, tolerance))
        return references

    def _compare(self, candidate: Candidate, references: list[Reference]) -> None:
        """Raise UnfitError if the candidate's output is not the reference's for some probe."""
        for inputs, reference in zip(self.inputs, references, strict=True):
            why = reference.why_wrong(functools.partial(self.job.run, candidate, inputs))
            if why is not None:
                raise UnfitError(why)


def _is_last_resort(runner: Any, inputs: Sequence[Any]) -> bool:
    hook = getattr(runner, "last_resort", None)
    return callable(hook) and bool(hook(inputs))

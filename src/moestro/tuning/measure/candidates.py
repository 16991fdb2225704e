"""Before the race at one bucket: who takes part, under the same conditions, and is fit to be timed.

For all candidates before the next step: inputs for each probe; outputs and workspaces for the largest of them
(`reserve`, `do_preparation`); compilation, in parallel; with `isolate`, one run in a child process that may
crash or hang; one run each, compared with the default's output.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.tuning.measure.bits import overwrite
from moestro.tuning.measure.compile import precompile
from moestro.tuning.measure.inputs import is_torch, synthesise
from moestro.tuning.measure.request import (
    OUT_OF_MEMORY,
    Candidate,
    Job,
    OutOfMemoryError,
    UnfitError,
    candidate_name,
    is_out_of_memory,
    record_name,
)
from moestro.tuning.measure.sandbox import Sandbox
from moestro.tuning.measure.verify import Verification
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
            self.before = [self._copies(inputs) for inputs in self.inputs]
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"the inputs do not fit: {error}") from error
            raise
        self.verification: Verification | None = None

    def _copies(self, inputs: Sequence[Any]) -> dict[int, Any]:
        """The dynamic inputs as they are."""
        dynamic = [i for i in range(len(inputs)) if self.profile.is_dynamic(i) and is_torch(inputs[i])]
        return {i: inputs[i].detach().clone() for i in dynamic}

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
        """Workspaces for the largest of these, and what each runner prepares, with the default tactic.

        Preparation sees other values than the candidates: what it computes is not the answer that a candidate
        which computes nothing could return.
        """
        watched = self.job.watched(self.profile) if self.job.policy.verify else None
        for index, runner in enumerate(self.job.runners):
            tactics = [c.tactic for c in candidates if c.index == index]
            if not tactics:
                continue
            default = Candidate(index, self.job.key.runners[index], DEFAULT_TACTIC, "")
            for inputs, before in zip(self.inputs, self.before, strict=True):
                if callable(getattr(runner, "reserve", None)):
                    runner.reserve(inputs, tactics)
                if "do_preparation" in inspect.signature(runner.forward).parameters:
                    _disguise(inputs, before)
                    self.job.run(default, inputs, do_preparation=True)
                    for i, value in before.items():
                        overwrite(inputs[i], value)
        if watched is not None:
            watched.accept()

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
        """Those that run, give what the first one that runs gives, and leave the weights alone."""
        if not self.job.policy.verify:
            return candidates
        self.verification = Verification(
            self.job, self.profile, self.inputs, self.before, lambda: self.late
        )

        def skip(candidate: Candidate, sound: int) -> bool:
            leave = self.late or (sound > 1 and self.past(FOR_CHECKS))
            if leave:
                self.skip(candidate)
            return leave

        return self.verification.sound(candidates, skip, self.fail)

    def fail(self, candidate: Candidate, error: Exception) -> None:
        """Note that a candidate is out, and why."""
        self.evidence.append(self.job.failed(candidate, error))


def _disguise(inputs: Sequence[Any], before: Mapping[int, Any]) -> None:
    """Other values for the dynamic inputs: the same ones in other places, so that they stay valid."""
    for i, value in before.items():
        rows = value.dim() > 0 and len(value) > 1
        if rows or (value.dim() and value.dtype.is_floating_point):
            overwrite(inputs[i], value.roll(1, 0 if rows else -1))


def _is_last_resort(runner: Any, inputs: Sequence[Any]) -> bool:
    hook = getattr(runner, "last_resort", None)
    return callable(hook) and bool(hook(inputs))

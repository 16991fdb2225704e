"""Before the race at one bucket: who takes part, under the same conditions, and is fit to be timed.

For all candidates before the next step: inputs for each probe; outputs and workspaces for the largest of them
(`reserve`, `do_preparation`); compilation, in parallel; with `isolate`, one run in a child process that may
crash or hang; one run each, compared with the default's output.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.errors import TuningWarning
from moestro.tuning.measure.bits import disguise, overwrite
from moestro.tuning.measure.compile import jobs_of, precompile_for
from moestro.tuning.measure.request import (
    OUT_OF_MEMORY,
    Candidate,
    Job,
    OutOfMemoryError,
    UnfitError,
    candidate_name,
    evidence_name,
    is_out_of_memory,
    record_name,
)
from moestro.tuning.measure.sandbox import Sandbox
from moestro.tuning.measure.verify import Verification, statics_of
from moestro.tuning.race.rounds import Samples
from moestro.tuning.spec.evidence import CandidateEvidence, Record
from moestro.tuning.spec.inputs import synthesise
from moestro.tuning.spec.keys import is_torch, shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key, valid_tactics
from moestro.tuning.spec.specs import Sizes

__all__ = ["Trial", "default_name", "resolved_default"]

OUTLASTS = "outlasts the budget"
NOTHING_RUNS = "nothing runs; this is the default"

FOR_CHECKS = (
    0.25  # of a bucket's time: what is not checked by then does not take part, so that a race is left
)


class Trial:
    """Candidates at one bucket. `evidence` grows by those that are not fit; `inputs` has one list a probe.

    deadline: job.budget.spent at which to stop. unfinished: an earlier tuning's record, which is gone on with.
    Raises OutOfMemoryError if the inputs do not fit.
    """

    def __init__(self, job: Job, bucket: Sizes, deadline: float, unfinished: Record | None = None) -> None:
        self.job, self.bucket, self.deadline = job, bucket, deadline
        self.started = job.budget.spent
        self.time = min(deadline - self.started, job.budget.left)
        self.evidence: list[CandidateEvidence] = []
        self.spare: list[Candidate] = []  # of last resort: for where nothing else runs
        self.shortest = math.inf  # seconds: the smallest reading of the clock so far
        self.before_this = _by_name(unfinished)
        self.samples = Samples(unfinished.samples if unfinished is not None else {})
        self.seconds_before = unfinished.evidence.seconds if unfinished is not None else 0.0
        self.profile = job.config.profile(shapes_of(job.inputs), bucket)
        self.default_seconds = 0.0  # of one run, where checking it has taken all of the time
        self._know_default()
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
        self.resolved_default = resolved_default(job, self.inputs[0])
        self.verification: Verification | None = None
        self.conditions: list[Mapping[str, Any]] = []  # what the timer said of its device
        self.loaded_s = 0.0  # of load before the race

    # --- the default ---------------------------------------------------------------------------------------
    def _know_default(self) -> None:
        """What an unfinished tuning says of it: how long it takes, if that was too long."""
        known = self.before_this.get(default_name(self.job))
        if known is not None and known.reason.startswith(OUTLASTS) and known.median:
            self.default_seconds = known.median

    @property
    def default_outlasts(self) -> bool:
        """Whether the default tactic alone takes longer than there was time: then it is run for the checks only,
        on top of the budget, and never in the race.
        """
        return self.default_seconds > 0

    def slow_default(self) -> CandidateEvidence:
        """The evidence for a default that outlasts the budget."""
        return CandidateEvidence(
            self.job.key.runners[0],
            DEFAULT_TACTIC,
            "eliminated",
            median=self.default_seconds,
            reason=f"{OUTLASTS}: one run takes {self.default_seconds:.3g} s",
        )

    @property
    def default_may_recover(self) -> bool:
        """Whether the default has failed here for the first time: then the next tuning tries it again."""
        name = default_name(self.job)
        failed = any(evidence_name(e) == name and self.has_raised(e) for e in self.evidence)
        known = self.before_this.get(name)
        return failed and (known is None or not (self.has_raised(known) or known.reason == NOTHING_RUNS))

    def has_raised(self, evidence: CandidateEvidence) -> bool:
        """Whether a candidate failed other than by want of memory."""
        return evidence.fate == "failed" and evidence.reason != OUT_OF_MEMORY

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
        return self.job.budget.spent - self.started > share * self.time

    def candidates(self, only: Sequence[Record] | None) -> list[Candidate]:
        """The default first, then every runner's tactics, warm ones first; without those in quarantine.

        Those of runners that are only a last resort go to `spare`, unless there is no other.
        """
        found: dict[str, Candidate] = {}
        last = {i for i, runner in enumerate(self.job.runners) if _is_last_resort(runner, self.inputs[0])}
        for index, runner in enumerate(self.job.runners):
            offered = valid_tactics(runner, self.inputs[0], self.profile, self.job.kwargs)
            for tactic in (DEFAULT_TACTIC, *offered):
                name = candidate_name(self.job.key.runners[index], tactic_key(tactic, runner))
                found.setdefault(name, Candidate(index, self.job.key.runners[index], tactic, name))
        default, *others = found.values()
        if only is not None:
            wanted = {record_name(record) for record in only}
            others = [c for c in others if c.name in wanted]
        warm = {record_name(record) for record in self.job.warm}
        others.sort(key=lambda c: c.name not in warm)
        others = self._gone_on_with(self._without_banned(others))
        fit = [default, *others]
        first = [c for c in fit if c.index not in last]
        self.spare = [c for c in fit if c.index in last] if first else []
        return first or fit

    def _without_banned(self, candidates: list[Candidate]) -> list[Candidate]:
        left = []
        for c in candidates:
            reason = self.job.banned.get(c.name)
            if reason is None:
                left.append(c)
            else:
                self.evidence.append(CandidateEvidence(c.runner, c.tactic, "quarantined", reason=reason))
        return left

    def _gone_on_with(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that an unfinished tuning has not eliminated: its winner first, then those with the fewest samples.
        What it has found of the others is kept.
        """
        left = []
        for c in candidates:
            known = self.before_this.get(c.name)
            if known is not None and (known.fate == "eliminated" or known.fate == "failed"):
                self.evidence.append(known)
            else:
                left.append(c)

        def order(c: Candidate) -> tuple[bool, int]:
            known = self.before_this.get(c.name)
            return (known is None or known.fate != "winner"), known.samples if known is not None else 0

        return sorted(left, key=order) if self.before_this else left

    def _was_checked(self, candidate: Candidate) -> bool:
        """Whether an unfinished tuning found it fit to be timed."""
        known = self.before_this.get(candidate.name)
        return known is not None and (known.samples > 0 or known.reason == "checked")

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

    def skip(self, candidate: Candidate, how_far: str = "") -> None:
        """Note that there was no time for a candidate; how_far: "checked" if it is fit to be timed."""
        known = self.before_this.get(candidate.name)
        if known is not None and known.samples:
            how_far = "checked"
        found = CandidateEvidence(candidate.runner, candidate.tactic, "not measured", reason=how_far)
        self.evidence.append(found)

    def reserve(self, candidates: list[Candidate]) -> None:
        """Workspaces for the largest of these, and what each runner prepares, with the default tactic.

        Preparation sees other values than the candidates: what it computes is not the answer that a candidate
        which computes nothing could return.
        """
        watched = statics_of(self.job, self.profile) if self.job.policy.verify else None
        for index, runner in enumerate(self.job.runners):
            tactics = [c.tactic for c in candidates if c.index == index]
            if not tactics:
                continue
            default = Candidate(index, self.job.key.runners[index], DEFAULT_TACTIC, "")
            for inputs, before in zip(self.inputs, self.before, strict=True):
                if callable(getattr(runner, "reserve", None)):
                    runner.reserve(inputs, tactics)
                if "do_preparation" in inspect.signature(runner.forward).parameters:
                    for i, value in before.items():
                        disguise(inputs[i], value)
                    self.job.run(default, inputs, do_preparation=True)
                    for i, value in before.items():
                        overwrite(inputs[i], value)
        if watched is not None:
            watched.accept()

    def _compiled(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that can be compiled, where their runner has a hook for it; equal jobs once."""
        if not self.job.compiles:
            return candidates
        jobs: dict[Any, Callable[[], object]] = {}
        needs: dict[tuple[Sizes, str], list[Any]] = {}
        for c in candidates:
            if (self.bucket, c.name) not in self.job.compiled:
                found = jobs_of(self.job.runners[c.index], self.inputs[0], c.tactic, c.name)
                jobs.update({key: job for key, job in found.items() if key not in jobs})
                needs[self.bucket, c.name] = list(found)
        failed = precompile_for(
            needs,
            jobs,
            self.job.compiled,
            lambda: self.late,
            lambda done, of: self.job.listener.step(f"bucket {self.bucket}: compiled {done}/{of}"),
        )
        left = []
        for c in candidates:
            error = next((failed[key] for key in needs.get((self.bucket, c.name), ()) if key in failed), None)
            if error is None:
                left.append(c)
            else:
                self.fail(c, error)
        return left

    def compile_jobs(self) -> dict[str, dict[Any, Callable[[], object]]]:
        """What must be compiled for each candidate here, by key."""
        return {
            c.name: jobs_of(self.job.runners[c.index], self.inputs[0], c.tactic, (self.bucket, c.name))
            for c in self.candidates(None)
        }

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
        known = [c for c in candidates if self._was_checked(c)]
        new = [c for c in candidates if c not in known and not c.is_default]
        default = [c for c in candidates if c.is_default]
        sound = {c.name for c in known}
        if new or not known:
            hurry = lambda: self.late and not self.default_outlasts  # noqa: E731
            self.verification = Verification(self.job, self.profile, self.inputs, self.before, hurry)
            start = self.job.budget.spent
            sound |= {c.name for c in self.verification.sound(default, lambda c, sound: False, self.fail)}
            self._time_default(start)
            sound |= {c.name for c in self.verification.sound(new, self._skips, self.fail)}
        else:
            sound |= {c.name for c in default}
        out = {evidence_name(e) for e in self.evidence}
        return [
            c
            for c in candidates
            if c.name in sound and c.name not in out and not (c.is_default and self.default_outlasts)
        ]

    def _skips(self, candidate: Candidate, sound: int) -> bool:
        """Whether there is no time to check a candidate."""
        share = 1.0 if self.default_outlasts else FOR_CHECKS
        leave = self.late or (sound > 1 and self.past(share))
        if leave:
            self.skip(candidate)
        return leave

    def _time_default(self, start: float) -> None:
        """Whether running the default for the checks has taken most of the budget, and all the time there was;
        then that is noted, and the next tuning gives the others their time on top of it.
        """
        assert self.verification is not None
        took = self.job.budget.spent - start
        if self.default_outlasts:
            self.job.budget.forgive(took)
        elif (
            self.late
            and self.verification.reference_runs
            and took >= (self.job.budget.seconds or math.inf) / 2
        ):
            self.default_seconds = took / self.verification.reference_runs

    def intact(self, fit: Sequence[Candidate]) -> bool:
        """Whether the race has left the weights alone. Else they are put back, and who writes them is found."""
        verification = self.verification
        if verification is None or not (names := verification.written()):
            return True
        found = False
        for candidate in fit:
            if candidate is verification.reference:
                continue
            for inputs in self.inputs:
                self.job.run(candidate, inputs)
            if written := verification.written():
                self.fail(candidate, UnfitError(f"changes {', '.join(written)}, which it may only read"))
                found = True
        if not found:
            warnings.warn(
                f"{self.job.key.op}: {', '.join(names)} changed while candidates were timed, and was put back; "
                "none of them does it again",
                TuningWarning,
                stacklevel=2,
            )
        return not found

    def fail(self, candidate: Candidate, error: Exception) -> None:
        """Note that a candidate is out, and why."""
        self.evidence.append(self.job.failed(candidate, error))


def default_name(job: Job) -> str:
    """What the default tactic is called."""
    return candidate_name(job.key.runners[0], DEFAULT_TACTIC)


def resolved_default(job: Job, inputs: Sequence[Any]) -> Any:
    """What the default tactic stands for at these inputs, as JSON, if its runner tells (`default_tactic`)."""
    runner = job.runners[0]
    hook = getattr(runner, "default_tactic", None)
    return tactic_key(hook(inputs), runner) if callable(hook) else None


def _by_name(record: Record | None) -> dict[str, CandidateEvidence]:
    return {} if record is None else {evidence_name(e): e for e in record.evidence.candidates}


def _is_last_resort(runner: Any, inputs: Sequence[Any]) -> bool:
    hook = getattr(runner, "last_resort", None)
    return callable(hook) and bool(hook(inputs))

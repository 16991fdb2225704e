"""What is being tuned: the job, its candidates and what they are called, and how candidates fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.tuning.group import Group
from moestro.tuning.measure.budget import Budget
from moestro.tuning.measure.timers import Timer
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import tactic_key
from moestro.tuning.spec.specs import Probe, Sizes, TuningConfig
from moestro.tuning.store.records import CandidateEvidence, Record

__all__ = ["Candidate", "Job", "OutOfMemoryError", "UnfitError", "candidate_name", "record_name"]

OUT_OF_MEMORY = "out of memory"


class OutOfMemoryError(Exception):
    """No candidate fits into memory at a bucket."""


class UnfitError(Exception):
    """A candidate gives another output than the reference, or does not survive in a child process."""


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
    banned: Mapping[str, str]  # candidates in quarantine, with the reason
    ban: Callable[[Candidate, str], None] = lambda candidate, reason: None
    warm: Sequence[Record] = ()  # decisions made elsewhere: tried first
    progress: Callable[[str], None] = lambda text: None
    # In a group of ranks (together.py): who decides, and the time that all ranks have left.
    group: Group | None = None
    decide: Callable[..., Record | None] | None = None
    left: Callable[[], float] | None = None

    def time_left(self) -> float:
        """Seconds left of the budget; in a group an exchange, the same answer for all ranks."""
        return self.budget.left if self.left is None else self.left()

    @property
    def probes(self) -> tuple[Probe | None, ...]:
        return self.config.probes or (None,)

    @property
    def probe_names(self) -> tuple[str, ...]:
        return tuple(probe.name for probe in self.config.probes)

    def run(self, candidate: Candidate, inputs: Sequence[Any], **more: Any) -> Any:
        """One run of a candidate."""
        runner = self.runners[candidate.index]
        call = runner if callable(runner) else runner.forward
        return call(inputs, tactic=candidate.tactic, **self.kwargs, **more)

    def failed(self, candidate: Candidate, error: Exception) -> CandidateEvidence:
        """What to note of a candidate that failed. It goes into quarantine unless only memory was short."""
        text = str(error) if isinstance(error, UnfitError) else f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or names_out_of_memory(text):
            return CandidateEvidence(candidate.runner, candidate.tactic, "failed", reason=OUT_OF_MEMORY)
        self.ban(candidate, text)
        return CandidateEvidence(candidate.runner, candidate.tactic, "quarantined", reason=text)


def names_out_of_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out, on a device or on the host."""
    return any(sign in text for sign in ("OutOfMemoryError", "out of memory", "MemoryError"))


def candidate_name(runner: str, tactic: Any) -> str:
    """What a candidate is called in quarantine: its runner and its tactic as JSON."""
    return f"{runner} {json.dumps(tactic, sort_keys=True)}"


def record_name(record: Record) -> str:
    """The candidate that a record chose."""
    return candidate_name(record.runner, tactic_key(record.tactic, None))

"""What is being tuned: the job, its candidates and what they are called, and how candidates fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.tuning.group import Group
from moestro.tuning.measure.budget import Budget
from moestro.tuning.measure.timers import Timer
from moestro.tuning.progress import Listener
from moestro.tuning.spec.evidence import CandidateEvidence, Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key
from moestro.tuning.spec.specs import Probe, Sizes, TuningConfig

__all__ = [
    "Candidate",
    "Job",
    "OutOfMemoryError",
    "UnfitError",
    "candidate_name",
    "evidence_name",
    "is_out_of_memory",
    "record_name",
]

OUT_OF_MEMORY = "out of memory"
# in lower case, with spaces for underscores
OUT_OF_MEMORY_SIGNS = (
    "outofmemory",
    "out of memory",
    "memoryerror",
    "memory error",
    "alloc cpu",
    "allocate memory",
    "tried to allocate",
    "unable to allocate",
    "failed to allocate",
    "not enough memory",
    "insufficient memory",
    "alloc failed",
    "allocation failed",
    "bad alloc",
    "memoryallocation",
    "enomem",
    "storage size calculation overflowed",
)


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

    @property
    def is_default(self) -> bool:
        """Whether it is what runs without a tuner: the first runner's default tactic."""
        return self.index == 0 and _is_default(self.tactic)


def _is_default(tactic: Any) -> bool:
    return type(tactic) is int and tactic == DEFAULT_TACTIC


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
    listener: Listener = field(default_factory=Listener)
    compiled: set[Any] = field(default_factory=set)  # (bucket, candidate) whose kernels are there
    statics: Any = None  # verify.Statics: what candidates must not write, found when first needed
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

    @property
    def compiles(self) -> bool:
        """Whether any runner has kernels to be compiled."""
        return any(hasattr(runner, hook) for runner in self.runners for hook in ("compile", "compile_jobs"))

    def run(self, candidate: Candidate, inputs: Sequence[Any], **more: Any) -> Any:
        """One run of a candidate, in a list of its own: it may put something else there."""
        runner = self.runners[candidate.index]
        call = runner if callable(runner) else runner.forward
        try:
            return call(list(inputs), tactic=candidate.tactic, **self.kwargs, **more)
        except SystemExit as error:
            raise RuntimeError(f"it left the program by SystemExit({error.code!r})") from error

    def failed(self, candidate: Candidate, error: Exception) -> CandidateEvidence:
        """What to note of a candidate that failed.

        One that is wrong, hangs or kills its process goes into quarantine, for all sizes; the default tactic
        never does. One that raises is out at this bucket: another may suit it.
        """
        if is_out_of_memory(error):
            return CandidateEvidence(candidate.runner, candidate.tactic, "failed", reason=OUT_OF_MEMORY)
        text = str(error) if isinstance(error, UnfitError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, UnfitError) or candidate.is_default:
            return CandidateEvidence(candidate.runner, candidate.tactic, "failed", reason=text)
        self.ban(candidate, text)
        return CandidateEvidence(candidate.runner, candidate.tactic, "quarantined", reason=text)

    def failed_in_race(self, found: CandidateEvidence) -> CandidateEvidence:
        """What to note of a candidate that failed while it was timed."""
        return replace(found, reason=OUT_OF_MEMORY) if names_out_of_memory(found.reason) else found


def evidence_name(evidence: CandidateEvidence) -> str:
    """The candidate that evidence is of."""
    return candidate_name(evidence.runner, tactic_key(evidence.tactic, None))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out, on a device or on the host."""
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, MemoryError) or names_out_of_memory(f"{type(error).__name__}: {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def names_out_of_memory(text: str) -> bool:
    """Whether an error's text says that memory ran out: torch's on a GPU and on the CPU, cuBLAS's and cuDNN's,
    the C++ library's, the driver's, numpy's.
    """
    text = text.lower().replace("_", " ")
    return any(sign in text for sign in OUT_OF_MEMORY_SIGNS)


def candidate_name(runner: str, tactic: Any) -> str:
    """What a candidate is called in quarantine: its runner and its tactic as JSON."""
    return f"{runner} {json.dumps(tactic, sort_keys=True)}"


def record_name(record: Record) -> str:
    """The candidate that a record chose."""
    return candidate_name(record.runner, tactic_key(record.tactic, None))

"""A decision, the evidence for it, and how both are written down.

A Record is what is stored: runner and tactic for one bucket, by name. A Decision is a record as it answers a
call: with the live runner, and a status that says how the size relates to what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.tuning.spec.plain_json import to_json
from moestro.tuning.spec.runner import tactic_from_json
from moestro.tuning.spec.specs import Sizes

__all__ = ["CandidateEvidence", "Decision", "Evidence", "Record"]

SCHEMA = 1


@dataclass(frozen=True)
class CandidateEvidence:
    """What is known of one candidate at one bucket.

    Times are in seconds. ratio is time over the default's time, with its confidence interval [low, high];
    over several probes it is the worst one, and `probes` has each.
    """

    runner: str
    tactic: Any
    fate: str  # "winner" | "finalist" | "eliminated" | "quarantined" | "failed" | "not measured"
    samples: int = 0
    median: float | None = None
    spread: float | None = None  # median absolute deviation, seconds
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    probes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Why a decision is as it is."""

    candidates: tuple[CandidateEvidence, ...] = ()
    noise_floor: float = 0.0  # ratio difference of the default to itself
    samples: int = 0
    seconds: float = 0.0
    clock: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def of(self, runner: str, tactic: Any) -> CandidateEvidence | None:
        """The evidence for one candidate, if it was one."""
        wanted = to_json(tactic)
        return next((c for c in self.candidates if c.runner == runner and to_json(c.tactic) == wanted), None)


@dataclass(frozen=True)
class Record:
    """A decision as stored: for one bucket and one set of probes of one static key."""

    bucket: Sizes
    runner: str  # the runner's identity in short (keys.StaticKey.runners)
    tactic: Any
    status: str  # "measured" | "default" | "quarantined"
    probes: tuple[str, ...] = ()
    tuned_for: Sizes = ()  # the largest sizes that a finished tuning with this bucket was asked for
    learned: bool = False  # a point of a crossover search, not a bucket of the scheme
    complete: bool = True  # False: the budget ended before the race did
    created: float = 0.0  # seconds since 1970
    environment: str = ""  # where it was measured (environment.Environment.name)
    evidence: Evidence = Evidence()

    def to_json(self) -> dict[str, Any]:
        """As JSON; from_json reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["tactic"] = to_json(self.tactic)
        fields["evidence"] = dataclasses.asdict(self.evidence)
        for written, candidate in zip(
            fields["evidence"]["candidates"], self.evidence.candidates, strict=True
        ):
            written["tactic"] = to_json(candidate.tactic)
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """From JSON. Raises KeyError, TypeError, ValueError or TuningError for what is not a record."""
        evidence = dict(data["evidence"])
        evidence["candidates"] = tuple(
            CandidateEvidence(**{**c, "tactic": _lenient(c["tactic"])}) for c in evidence["candidates"]
        )
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        for name in ("bucket", "tuned_for"):
            fields[name] = tuple(int(size) for size in fields[name])
        if not isinstance(fields["runner"], str) or not isinstance(fields["created"], int | float):
            raise TypeError("not a record")
        fields["probes"] = tuple(fields["probes"])
        fields["tactic"] = tactic_from_json(fields["tactic"])
        fields["evidence"] = Evidence(**evidence)
        return cls(**fields)


def _lenient(tactic: Any) -> Any:
    """A losing tactic is only shown, so one that cannot be made again stays as it was written."""
    try:
        return tactic_from_json(tactic)
    except Exception:
        fields = tactic.get("fields") if isinstance(tactic, dict) else None
        if not isinstance(fields, dict):
            return str(tactic)
        return " ".join(f"{name}={value}" for name, value in fields.items())


@dataclass(frozen=True)
class Decision:
    """What answers a call, and why.

    bucket: the size that it was measured at (a tuple with several dynamic dimensions, () with none). status:
    "measured"; "extrapolated", the size is beyond everything tuned; "default", nothing better was found or
    could be measured; "quarantined", every other candidate is in quarantine.
    """

    runner: Any
    tactic: Any
    bucket: int | Sizes
    status: str
    evidence: Evidence
    record: Record
    source: str = "memory"  # "memory" | a folder | a bundle

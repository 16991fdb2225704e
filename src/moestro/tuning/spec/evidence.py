"""What is known: of a candidate, of a bucket, and how it is written down.

CandidateEvidence is one class from the race that measures it to the record and the page that shows it. A Record is
what is stored: runner and tactic for one bucket, by name. A Decision is a record as it answers a call: with the live
runner, and a status that says how the size relates to what was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.plain_json import to_json
from moestro.tuning.spec.runner import stored_tactic, tactic_from_json, tactic_key
from moestro.tuning.spec.specs import Sizes

__all__ = ["CandidateEvidence", "Decision", "Evidence", "Record"]

SCHEMA = 1


@dataclass(frozen=True)
class CandidateEvidence:
    """What is known of one candidate at one bucket.

    Times are in seconds. ratio is time over the default's time, below 1 is faster, with the interval [low, high]
    that holds at every look, at the policy's confidence; over several probes it is the worst one, and `probes`
    has each.
    """

    runner: str
    tactic: Any
    fate: str  # "winner" | "finalist" | "eliminated" | "quarantined" | "failed" | "not measured"
    samples: int = 0  # runs, over all probes
    median: float | None = None  # of the slowest probe
    spread: float | None = None  # robust standard deviation of single runs of that probe, seconds
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    # "won" | "tied" | "undecided" | "default beaten" | "slower" | "no gain" | "screened" | "failed: ..." | other words
    reason: str = ""
    probes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # name -> median, ratio


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
    # what the device did meanwhile (timers that know it): "sm_mhz" [least, most], "throttle" [reasons] ...
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def of(self, runner: str, tactic: Any) -> CandidateEvidence | None:
        """The evidence for one candidate, if it was one."""
        wanted = _key(tactic)
        return next((c for c in self.candidates if c.runner == runner and _key(c.tactic) == wanted), None)


def _key(tactic: Any) -> Any:
    """What tells a tactic from others; its text where it is only shown."""
    try:
        return tactic_key(tactic, None)
    except TuningError:
        return str(tactic)


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
    evidence: Evidence = field(default_factory=Evidence)
    default: Any = None  # what the default tactic stood for, as JSON, where its runner tells
    samples: Mapping[str, Any] = field(
        default_factory=dict
    )  # of a race to be continued (race.rounds.Samples)
    source: str = field(default="memory", compare=False)  # "memory" | a folder | a bundle; not written

    @property
    def is_decided(self) -> bool:
        """Whether it answers calls: an unfinished one does as soon as something has been raced."""
        return self.complete or self.status != "default" or self.evidence.reason not in ("budget", "time")

    def to_json(self) -> dict[str, Any]:
        """As JSON; from_json reads it back."""
        fields = {name: getattr(self, name) for name in WRITTEN}
        fields["tactic"] = to_json(stored_tactic(self.tactic))
        fields["evidence"] = dataclasses.asdict(self.evidence)
        for written, candidate in zip(
            fields["evidence"]["candidates"], self.evidence.candidates, strict=True
        ):
            written["tactic"] = to_json(stored_tactic(candidate.tactic))
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """From JSON. Raises KeyError, TypeError, ValueError or TuningError for what is not a record."""
        return cls.unmade(data)._with_tactic(data["tactic"])

    @classmethod
    def unmade(cls, data: Mapping[str, Any]) -> Record:
        """As from_json, but without making the tactic, whose class may not be loaded."""
        evidence = dict(data["evidence"])
        evidence["candidates"] = tuple(
            CandidateEvidence(**{**c, "tactic": _lenient(c["tactic"])}) for c in evidence["candidates"]
        )
        fields = {name: data[name] for name in WRITTEN if name in data or name in REQUIRED}
        fields = {**DEFAULTS, **fields}
        for name in ("bucket", "tuned_for"):
            fields[name] = _sizes(name, fields[name])
        if fields["tuned_for"] and len(fields["tuned_for"]) != len(fields["bucket"]):
            raise ValueError(f"tuned_for {fields['tuned_for']} of bucket {fields['bucket']}")
        for name, kind in KINDS_OF.items():
            if type(fields[name]) is not kind and not (kind is float and type(fields[name]) is int):
                raise TypeError(f"{name} must be a {kind.__name__}, got {fields[name]!r}")
        if not math.isfinite(fields["created"]):
            raise ValueError(f"created must be a time, got {fields['created']!r}")
        if fields["status"] not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {fields['status']!r}")
        probes = fields["probes"]
        if not isinstance(probes, list | tuple) or not all(isinstance(name, str) for name in probes):
            raise TypeError(f"probes must be names, got {probes!r}")
        fields["probes"] = tuple(probes)
        if not isinstance(fields["samples"], Mapping):
            raise TypeError(f"samples must be an object, got {fields['samples']!r}")
        fields["tactic"] = None
        fields["evidence"] = _checked(Evidence(**evidence))
        return cls(**fields)

    def _with_tactic(self, written: Any) -> Record:
        return dataclasses.replace(self, tactic=tactic_from_json(written))


WRITTEN = tuple(f.name for f in dataclasses.fields(Record) if f.name != "source")
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Record) if f.default is not dataclasses.MISSING}
DEFAULTS |= {"samples": {}}
REQUIRED = {"bucket", "runner", "tactic", "status", "created", "evidence"}
KINDS_OF = {
    "runner": str,
    "status": str,
    "environment": str,
    "learned": bool,
    "complete": bool,
    "created": float,
}
STATUSES = ("measured", "default", "quarantined")
NUMBERS = ("median", "spread", "ratio", "low", "high")
LARGEST = 1 << 62


def _sizes(name: str, value: Any) -> Sizes:
    """Sizes as they may be: positive integers."""
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 < n <= LARGEST for n in value):
        raise ValueError(f"{name} must be positive integers, got {value!r}")
    return tuple(value)


def _checked(evidence: Evidence) -> Evidence:
    """Evidence whose numbers are numbers. Raises TypeError or ValueError."""
    for c in evidence.candidates:
        for name in NUMBERS:
            value = getattr(c, name)
            if value is not None and (type(value) not in (int, float) or not value >= 0):
                raise ValueError(f"{name} of a candidate must be a positive number, got {value!r}")
        words = all(isinstance(text, str) for text in (c.runner, c.fate, c.reason))
        rows = isinstance(c.probes, Mapping) and all(isinstance(row, Mapping) for row in c.probes.values())
        if not words or not rows or type(c.samples) is not int:
            raise TypeError(f"not a candidate: {c!r}")
    if not isinstance(evidence.policy, Mapping) or not isinstance(evidence.conditions, Mapping):
        raise TypeError("not evidence")
    if not isinstance(evidence.reason, str):
        raise TypeError("not evidence")
    if any(type(n) not in (int, float) for n in (evidence.noise_floor, evidence.samples, evidence.seconds)):
        raise TypeError("not evidence")
    return evidence


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

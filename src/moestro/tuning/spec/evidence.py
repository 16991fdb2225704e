"""What is known of a candidate: one class, from the race that measures it to the record and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.runner import tactic_key

__all__ = ["CandidateEvidence", "Evidence"]


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

"""How candidates are measured and how sure a choice must be: one frozen record, part of a decision's key."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from moestro.errors import TuningError, as_count, as_flag

__all__ = ["MeasurementPolicy"]


@dataclass(frozen=True)
class MeasurementPolicy:
    """The settings of a measurement. Ratios are relative (0.02 is 2 %), times are seconds.

    Raises TuningError for a value that makes no sense, naming it.
    """

    confidence: float = 0.95  # of a whole race: no candidate that should win is eliminated
    min_gain: float = 0.02  # a tactic replaces the default only if it is better by more than this
    tie: float = 0.005  # tactics closer than this are equal: the preferred one wins, then the first listed
    resolution: float = 0.005  # tie + resolution is always told apart from tie, given rounds enough
    min_rounds: int = 3  # before anything is eliminated but by screening
    max_rounds: int = 1000
    max_seconds: float | None = (
        10.0  # wall time of one race; None: only max_rounds and the caller's budget end it
    )
    screen_ratio: float = 1.5  # slower than the best by this factor, twice: out before the first paired round
    warmup: int = 2  # runs before the first timed one
    min_sample_seconds: float = 20e-6  # CPU: calls that are shorter are repeated up to this
    verify: bool = True  # compare every candidate's output with the default's before it is timed
    cold_cache: bool = True  # weights and inputs come from memory, not from the last-level cache
    isolate: bool = False  # try candidates in a child process first, which may die or hang
    time_limit: float = 30.0  # a candidate's trial that takes longer is a hang
    # of load before a race from 1024 rows on, where a GPU then falls from its boost clock; 0: none
    sustained_s: float = 2.0
    seed: int = 0  # of orders and of synthesised inputs

    def __post_init__(self) -> None:
        self._check_types()
        for name, ok, expected in (
            ("confidence", 0.5 <= self.confidence < 1, "in [0.5, 1)"),
            ("min_gain", 0 <= self.min_gain < 1, "in [0, 1)"),
            ("tie", 0 <= self.tie < 1, "in [0, 1)"),
            ("resolution", 0 < self.resolution < 1, "in (0, 1)"),
            ("min_rounds", self.min_rounds >= 2, "at least 2"),
            ("max_rounds", self.max_rounds >= self.min_rounds, "at least min_rounds"),
            ("max_seconds", self.max_seconds is None or self.max_seconds > 0, "positive or None"),
            ("screen_ratio", self.screen_ratio > 1, "above 1"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("min_sample_seconds", 0 <= self.min_sample_seconds < math.inf, "finite and at least 0"),
            ("sustained_s", 0 <= self.sustained_s < math.inf, "finite and at least 0"),
            ("time_limit", self.time_limit > 0, "positive"),
        ):
            if not ok:
                raise TuningError(f"MeasurementPolicy.{name} must be {expected}, got {getattr(self, name)!r}")

    def _check_types(self) -> None:
        """Each field as its default is: a switch, a count or a number; numpy's become Python's, for the key."""
        for one in fields(self):
            value, name = getattr(self, one.name), f"MeasurementPolicy.{one.name}"
            if isinstance(one.default, bool):
                plain: Any = as_flag(name, value, TuningError)
            elif isinstance(one.default, int):
                plain = as_count(name, value, TuningError, least=None)
            elif value is None and one.name == "max_seconds":
                plain = None
            elif isinstance(value, Real) and not isinstance(value, bool):
                plain = float(value)
            else:
                raise TuningError(f"{name} must be a number, got {value!r}")
            object.__setattr__(self, one.name, plain)

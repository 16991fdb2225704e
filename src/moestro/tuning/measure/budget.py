"""Seconds that a tuning may take, and how they are counted."""

from __future__ import annotations

import time
from collections.abc import Callable

from moestro.errors import TuningError

__all__ = ["Budget"]


class Budget:
    """Seconds that tuning may take. Only what is spent between start() and stop() counts.

    Simulated timers report seconds that no clock sees pass; whichever is more counts, the clock or their
    samples.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if seconds is not None and (isinstance(seconds, bool) or not seconds >= 0):
            raise TuningError(f"budget_s must be seconds >= 0 or None, got {seconds!r}")
        self.seconds = seconds
        self.clock = clock
        self._spent = 0.0
        self._sampled = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = self.clock()
        self._sampled = 0.0

    def stop(self) -> None:
        self._spent = self.spent
        self._since = None

    def sampled(self, seconds: float) -> None:
        """A timer has reported this many seconds."""
        self._sampled += seconds

    @property
    def spent(self) -> float:
        running = 0.0 if self._since is None else max(self.clock() - self._since, self._sampled)
        return self._spent + running

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self.seconds is None else self.seconds - self.spent

"""Seconds that a tuning may take, and how they are counted."""

from __future__ import annotations

import contextlib
import math
import numbers
import time
from collections.abc import Callable, Iterator

from moestro.errors import TuningError

__all__ = ["Budget"]


class Budget:
    """Seconds that tuning may take. Only what is spent between start() and stop() counts, once where tunings nest.

    Simulated timers report seconds that no clock sees pass; whichever is more counts, the clock or their samples.
    What is spent of an inner context's budget is spent of the outer one's, too, and the inner one is never longer
    than what the outer one has left when it is entered: where that is nothing, nothing is measured inside.
    """

    def __init__(
        self,
        seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
        outer: Budget | None = None,
    ) -> None:
        self.seconds = None if seconds is None else _seconds(seconds)
        self.clock, self.outer = clock, outer
        if outer is not None and outer.left < math.inf:
            left = max(0.0, outer.left)
            self.seconds = left if self.seconds is None else min(left, self.seconds)
        self._spent = 0.0
        self._sampled = 0.0
        self._forgiven = 0.0
        self._since: float | None = None
        self._running = 0  # tunings inside one another

    def start(self) -> None:
        if self.outer is not None:
            self.outer.start()
        self._running += 1
        if self._running == 1:
            self._since, self._sampled = self.clock(), 0.0

    def stop(self) -> None:
        if self.outer is not None:
            self.outer.stop()
        self._running -= 1
        if self._running == 0:
            self._spent, self._forgiven = self.spent, 0.0
            self._since = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """start() and stop() around a block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def sampled(self, seconds: float) -> None:
        """A timer has reported this many seconds."""
        self._sampled += seconds
        if self.outer is not None:
            self.outer.sampled(seconds)

    def forgive(self, seconds: float) -> None:
        """These seconds do not count: what took them takes longer than any budget that was given."""
        self._forgiven += seconds
        if self.outer is not None:
            self.outer.forgive(seconds)

    @property
    def spent(self) -> float:
        running = 0.0 if self._since is None else max(self.clock() - self._since, self._sampled)
        return self._spent + running - self._forgiven

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return math.inf if self.seconds is None else self.seconds - self.spent


def _seconds(value: object) -> float:
    """A budget as given. Raises TuningError for what is no number of seconds from 0 on."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.nan
    if not number >= 0:
        text = repr(value)
        raise TuningError(
            f"budget_s must be seconds >= 0 or None, got {text if len(text) < 80 else text[:77] + '...'}"
        )
    return number

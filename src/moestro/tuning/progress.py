"""What tuning and benchmarks say while they work: nothing, lines to a function, one line that is drawn anew in the
terminal, or stages and steps to a Listener.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moestro.errors import TuningError

__all__ = ["Listener", "Progress", "as_progress", "showing"]


class Listener:
    """Hears how a run goes and says nothing; the command line draws it."""

    def stage(self, text: str, total: int) -> None:
        """A stage begins, of `total` steps."""

    def step(self, text: str) -> None:
        """Something within the stage goes on."""

    def done(self) -> None:
        """One step of the stage is done."""


class _Lines(Listener):
    """Says each stage and step as a line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._stage, self._done, self._total = say, "", 0, 0

    def stage(self, text: str, total: int) -> None:
        self._stage, self._done, self._total = text, 0, total
        self._say(text)

    def step(self, text: str) -> None:
        self._say(f"{self._stage} {min(self._done + 1, self._total)}/{self._total}: {text}")

    def done(self) -> None:
        self._done += 1


Progress = bool | Callable[[str], None] | Listener


def as_progress(value: Progress | None) -> Progress | None:
    """A progress, or None for none. Raises TuningError for anything else."""
    if value is None or isinstance(value, bool | Listener) or callable(value):
        return value
    raise TuningError(f"progress must be True, False, a function of a line or a Listener, got {value!r}")


@contextmanager
def showing(progress: Progress) -> Iterator[Listener]:
    """Who hears of the progress, while the context lasts."""
    if isinstance(progress, Listener):
        yield progress
    elif callable(progress):
        yield _Lines(progress)
    elif not progress:
        yield Listener()
    else:
        from rich.console import Console

        with Console(stderr=True).status("tuning", spinner="dots") as status:
            yield _Lines(status.update)

"""The terminal: one console for output, one for errors, and progress that vanishes when it is done."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from moestro.errors import CheckpointWarning, StoreWarning, TuningWarning
from moestro.tuning.progress import Listener

__all__ = ["ProgressListener", "errors", "output", "plain_warnings", "progress", "quiet", "seconds_text"]

output = Console()
errors = Console(stderr=True)


def progress() -> Progress:
    """A progress bar on stderr, so that output can be piped."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )


def seconds_text(seconds: float) -> str:
    """Three significant digits in the unit that fits: 63.2 µs, 1.52 ms, 2.00 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * scale
        if value >= 1 or unit == "µs":
            return f"{value:.{max(0, 2 - max(0, len(str(int(value))) - 1))}f} {unit}"
    raise AssertionError("unreachable")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TuningWarning: results say for each row whether its decision was measured, and where."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        yield


def plain_warnings() -> None:
    """From here on a warning of ours is a line of its own, above a progress bar, without where in the code it came from."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, StoreWarning | TuningWarning | CheckpointWarning):
            errors.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


class ProgressListener(Listener):
    """Draws a run's stages as one progress bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)
        self._title = ""

    def stage(self, text: str, total: int) -> None:
        self._title = text
        self._bar.reset(self._task, total=total, description=text)

    def step(self, text: str) -> None:
        self._bar.update(self._task, description=f"{self._title} [dim]{text}[/]")

    def done(self) -> None:
        self._bar.advance(self._task)

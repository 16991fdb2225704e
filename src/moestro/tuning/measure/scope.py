"""Whether this thread is in a warm-up or timed run of a measurement.

Runners ask it to decide what only a measurement may do, such as working in buffers sized for the largest
candidate. It is true on the measuring thread, inside the measured call, and nowhere else: not in look-ups,
preparation, the run after the choice, or other threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["capturing", "is_in_profile_measurement", "measured", "measurement"]

_here = threading.local()


def is_in_profile_measurement() -> bool:
    """True on the measuring thread in warm-up and timed runs."""
    return getattr(_here, "depth", 0) > 0


@contextmanager
def measurement() -> Iterator[None]:
    """The scope of one warm-up or timed run, or of a capture that will be timed."""
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1


def _forked() -> None:
    """A child that was forked inside a measured call measures nothing."""
    _here.depth = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def measured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, inside the scope whenever it is run: what to hand to a timer that does not know the scope."""

    def run() -> Any:
        before = getattr(_here, "depth", 0)
        _here.depth = before + 1
        try:
            return call()
        finally:
            _here.depth = before

    run.__wrapped__ = call  # type: ignore[attr-defined]  # what is measured, for a timer that asks
    return run


def capturing() -> bool:
    """Whether this thread's stream is being captured into a CUDA graph, where nothing may be measured."""
    torch = sys.modules.get("torch")
    try:
        return torch is not None and bool(torch.cuda.is_current_stream_capturing())
    except RuntimeError:  # a torch without CUDA
        return False

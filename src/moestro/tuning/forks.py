"""What must be made anew in a forked child: locks, which other threads of the parent may have held."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

__all__ = ["Forked", "Lock", "survive"]


class Forked(Protocol):
    """Who is told in the child."""

    def forked(self) -> None: ...


_all: WeakSet[Forked] = WeakSet()


def survive(thing: Forked) -> None:
    """Have `forked` called in every child of this process, as long as the thing lives."""
    _all.add(thing)


class Lock:
    """A lock that no child finds taken, whatever threads its parent had. make: threading.RLock for one that its
    holder may take again.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make, self._lock = make, make()
        survive(self)

    def forked(self) -> None:
        """This process is a child."""
        self._lock = self._make()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the child of a fork inside the block: its lock is free
            self._lock.release()


def _in_child() -> None:
    for thing in list(_all):
        thing.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

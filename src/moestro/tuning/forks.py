"""What must be made anew in a forked child: locks, which other threads of the parent may have held."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["Forked", "survive"]


class Forked(Protocol):
    """Who is told in the child."""

    def forked(self) -> None: ...


_all: WeakSet[Forked] = WeakSet()


def survive(thing: Forked) -> None:
    """Have `forked` called in every child of this process, as long as the thing lives."""
    _all.add(thing)


def _in_child() -> None:
    for thing in list(_all):
        thing.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

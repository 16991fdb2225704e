"""The errors of Moestro.

MoestroError
├── ShapeError      a tensor has the wrong rank or size            (also a ValueError)
├── DTypeError      a tensor has the wrong dtype                   (also a TypeError)
├── DeviceError     a tensor or a backend is on the wrong device   (also a ValueError)
├── FormatError     an unknown number format, or values it cannot hold (also a ValueError)
├── RoutingError    routing that cannot be: top_k > E, unknown method, ids out of range (also a ValueError)
├── BackendError    an unknown backend, or one that cannot run this call (also a ValueError)
├── ModelError      an unknown model name                          (also a ValueError)
├── FileError       a file that cannot be made or written          (also an OSError)
├── PackageError    a package that an extra of moestro's brings is not here, or too old (also an ImportError)
└── TuningError     a tuner that was set up wrongly, or a miss where tuning is not allowed (also a RuntimeError)
    └── GroupError  ranks that work together have lost one, or one did not come in time; it names the rank

StoreWarning        the store could not be read or written; work goes on without it (a UserWarning)
TuningWarning       a decision is used outside what was measured    (a UserWarning)
CheckpointWarning   a checkpoint has something odd that was stood in for, or is not used    (a UserWarning)

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import TypeVar

__all__ = [
    "BackendError",
    "CheckpointWarning",
    "DTypeError",
    "DeviceError",
    "FileError",
    "FormatError",
    "GroupError",
    "ModelError",
    "MoestroError",
    "PackageError",
    "RoutingError",
    "ShapeError",
    "StoreWarning",
    "TuningError",
    "TuningWarning",
    "as_count",
    "as_flag",
    "as_optional",
    "unknown_name",
]


T = TypeVar("T")


class MoestroError(Exception):
    """Base of every error that Moestro raises on purpose."""


class ShapeError(MoestroError, ValueError):
    """A tensor has the wrong rank or size."""


class DTypeError(MoestroError, TypeError):
    """A tensor has the wrong dtype."""


class DeviceError(MoestroError, ValueError):
    """A tensor or a backend is on the wrong device."""


class FormatError(MoestroError, ValueError):
    """An unknown number format, or values that the format cannot hold."""


class RoutingError(MoestroError, ValueError):
    """Routing that cannot be: top_k > E, an unknown method, ids out of range."""


class BackendError(MoestroError, ValueError):
    """An unknown backend, or one that cannot run this call."""


class ModelError(MoestroError, ValueError):
    """An unknown model name."""


class FileError(MoestroError, OSError):
    """A file that cannot be made or written: no room, no permission."""


class PackageError(MoestroError, ImportError):
    """A package that one of moestro's extras brings is not installed, or too old."""


class TuningError(MoestroError, RuntimeError):
    """A tuner that was set up wrongly, or a miss where tuning is not allowed."""


class GroupError(TuningError):
    """Ranks that work together have lost one, or one did not come in time."""


class StoreWarning(UserWarning):
    """The store could not be read or written; work goes on without it."""


class TuningWarning(UserWarning):
    """A decision is used outside what was measured."""


class CheckpointWarning(UserWarning):
    """A checkpoint has something odd that was stood in for, or that is not used."""


def unknown_name(kind: str, got: object, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest names first, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"unknown {kind} {got!r}{hint} Known: {', '.join(names)}"
        if hint
        else (f"unknown {kind} {got!r}; known: {', '.join(names)}")
    )


def as_flag(name: str, value: object, error: type[MoestroError]) -> bool:
    """A switch as a bool: Python's and numpy's booleans. Raises `error`, naming the argument, for anything else."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise error(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_count(name: str, value: object, error: type[MoestroError], least: int | None = 1) -> int:
    """An integer argument as an int: Python's and numpy's integers, no booleans, no floats, at least `least` (None:
    any).

    Raises `error`, naming the argument, for anything else.
    """
    if not isinstance(value, bool):
        try:
            count = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            if least is None or count >= least:
                return count
    words: dict[int | None, str] = {None: "an integer", 1: "a positive integer"}
    wanted = words.get(least, f"an integer of at least {least}")
    raise error(f"{name} must be {wanted}, got {value!r}")


def as_optional(name: str, value: object, kind: type[T], error: type[MoestroError]) -> T | None:
    """An object of a class, or None. Raises `error`, naming the argument, for anything else."""
    if value is not None and not isinstance(value, kind):
        raise error(f"{name} must be a {kind.__name__} or None, got {value!r}")
    return value

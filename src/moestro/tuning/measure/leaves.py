"""What is in a result, in keyword arguments or in a runner: its leaves, each with the path to it.

Tuples, lists, dicts, sets, dataclasses, named tuples and objects with attributes are walked; tensors, arrays,
numbers, texts and enums are leaves. What has nothing inside that could be compared (a lock, a handle, a function)
is an Opaque leaf, known by its type alone. Works without torch.
"""

from __future__ import annotations

import enum
import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.tuning.spec.keys import is_torch

__all__ = ["Leaf", "Opaque", "leaves", "tensors_in"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum)
CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
DEEPEST = 12
MOST = 100_000  # leaves; what has more is no result

Leaf = tuple[str, Any]  # (path, value)


@dataclass(frozen=True)
class Opaque:
    """A value that cannot be compared."""

    kind: str


def leaves(value: Any) -> list[Leaf]:
    """The leaves of a value; none of None."""
    return [] if value is None else list(itertools.islice(_walk(value, "", DEEPEST, set(), False), MOST))


def tensors_in(value: Any) -> list[Leaf]:
    """The torch tensors of a value; what it holds more than once is looked into once."""
    found = itertools.islice(_walk(value, "", DEEPEST, set(), True), MOST)
    return [(path, leaf) for path, leaf in found if is_torch(leaf)]


def _walk(value: Any, path: str, depth: int, seen: set[int], once: bool) -> Iterator[Leaf]:
    """seen: the objects that this one is inside of, where it must not go round in circles; or all so far."""
    if is_torch(value) or isinstance(value, PLAIN) or _is_array(value):
        yield path, value
        return
    parts = None if depth == 0 or id(value) in seen or isinstance(value, CODE) else _parts(value)
    if parts is None:
        yield path, Opaque(f"{type(value).__module__}.{type(value).__qualname__}")
        return
    inside = seen if once else set(seen)
    inside.add(id(value))
    for name, part in parts:
        yield from _walk(part, f"{path}{name}", depth - 1, inside, once)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def _parts(value: Any) -> list[Leaf] | None:
    """(what to add to the path, part) of a container or an object; None of what has none."""
    if isinstance(value, tuple | list):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", value[key]) for key in value]
    if isinstance(value, set | frozenset):
        return [(f"{{{i}}}", part) for i, part in enumerate(sorted(value, key=repr))]
    attributes = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and not name.startswith("__"):
                attributes[name] = getattr(value, name)
    return [(f".{name}", part) for name, part in attributes.items()] or None

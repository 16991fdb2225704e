"""Weights as a list of tensors and a string that says how they belong together, for custom operators.

A torch operator takes tensors, lists of tensors and strings. The string is equal for layers of one model, so
that a graph compiled for one serves all. `live` finds the object that a list of tensors came from, with what
it has cached; where there is none (an exported program), `unflatten` makes a new one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moestro.errors import FormatError

PACKAGE = "moestro."

# tensor -> {role: weak reference to who holds it}; a cache of identities, never of values
_holders: Any = WeakIdKeyDictionary()  # untyped in torch


def flatten(holder: Any) -> tuple[list[torch.Tensor], str]:
    """(tensors, spec) of a dataclass of tensors, nested dataclasses of tensors and plain values.

    Raises FormatError for a field that is none of these.
    """
    tensors: list[torch.Tensor] = []
    return tensors, json.dumps(_describe(holder, tensors))


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, tensors) for item in value]}
    cls = type(value)
    if dataclasses.is_dataclass(value) and cls.__module__.startswith(PACKAGE):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return {
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "fields": {name: _describe(getattr(value, name), tensors) for name in fields},
        }
    raise FormatError(f"weights must be dataclasses of tensors and plain values, got a {cls.__qualname__}")


def unflatten(tensors: Sequence[torch.Tensor], spec: str) -> Any:
    """What `flatten` took apart."""
    return _rebuild(_parsed(spec), tensors)


@functools.lru_cache(maxsize=256)
def _parsed(spec: str) -> Any:
    return json.loads(spec)


def _rebuild(description: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if not isinstance(description, dict):
        return description
    if "tensor" in description:
        return tensors[description["tensor"]]
    if "tuple" in description:
        return tuple(_rebuild(item, tensors) for item in description["tuple"])
    module, _, name = description["class"].partition(":")
    if not module.startswith(PACKAGE):
        raise FormatError(f"spec must name classes of moestro, got {description['class']!r}")
    cls = getattr(importlib.import_module(module), name)
    return cls(**{key: _rebuild(value, tensors) for key, value in description["fields"].items()})


def remember(tensors: Sequence[torch.Tensor], role: str, holder: Any) -> None:
    """Note that `holder` is made of these tensors, in this role."""
    _holders.setdefault(tensors[0], {})[role] = weakref.ref(holder)


def live(tensors: Sequence[torch.Tensor], role: str) -> Any | None:
    """Who was remembered in this role with the first of these tensors, if it is still there."""
    reference = _holders.get(tensors[0], {}).get(role)
    return None if reference is None else reference()

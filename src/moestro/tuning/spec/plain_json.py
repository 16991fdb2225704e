"""Values of runners and tactics as JSON and as keys: readable, the same in every process, never an id().

Plain values (None, bool, int, float, str) are themselves. A tuple is a JSON list; everything else that is not
plain is an object with one key that says what it is: {"list": [...]}, {"dict": [[k, v], ...]}, {"set":
[...]}, {"enum": "module:Class", "name": ...}, {"object": "module:Class", "fields": {...}} for dataclasses and
named tuples, {"name": "module:qualname"} for functions and classes, and {"text": "torch.bfloat16", "type":
...} for dtypes and devices.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import pathlib
import sys
from typing import Any

from moestro.errors import TuningError

__all__ = ["digest", "from_json", "to_json"]

TEXT_TYPES = {
    "dtype",
    "device",
    "layout",
    "memory_format",
    "Size",
}  # of torch; str() says all there is to them


def to_json(value: Any) -> Any:
    """A JSON value that stands for `value`. Raises TypeError for what has no value of its own (an object, a
    lambda).
    """
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, enum.Enum) else _enum(value)
    if isinstance(value, enum.Enum):
        return _enum(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"text": repr(float(value)), "type": "float"}
    if isinstance(value, tuple | list | dict | set | frozenset):
        return _container(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"object": _name(type(value)), "fields": {k: to_json(v) for k, v in fields.items()}}
    return _opaque(value)


def _container(value: Any) -> Any:
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            fields = {k: to_json(v) for k, v in value._asdict().items()}
            return {"object": _name(type(value)), "fields": fields}
        if type(value).__name__ in TEXT_TYPES:
            return [int(v) for v in value]
        return [to_json(v) for v in value]
    if isinstance(value, list):
        return {"list": [to_json(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
    return {"set": sorted((to_json(v) for v in value), key=json.dumps)}


def _opaque(value: Any) -> Any:
    kind = type(value)
    package = kind.__module__.split(".")[0]
    if package == "torch" and kind.__name__ in TEXT_TYPES:
        return {"text": str(value), "type": _name(kind)}
    if package == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return to_json(value.item())
    if isinstance(value, pathlib.PurePath):
        return {"text": str(value), "type": "path"}
    if isinstance(value, bytes):
        return {"text": value.hex(), "type": "bytes"}
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return {"name": _name(value)}
    raise TypeError(f"{value!r} of type {_name(kind)} has no value that another process could compare")


def _enum(value: enum.Enum) -> Any:
    return {"enum": _name(type(value)), "name": value.name}


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def from_json(value: Any) -> Any:
    """The value of a tactic that to_json wrote. Raises TuningError for what cannot be made again here.

    Classes are taken from modules that are already imported; nothing is imported for a file's sake.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [from_json(v) for v in value["list"]]
    if "enum" in value:
        return _find(value["enum"], enum.Enum)[value["name"]]
    if "object" in value:
        fields = {k: from_json(v) for k, v in value["fields"].items()}
        return _find(value["object"], object)(**fields)
    raise TuningError(f"a tactic cannot be read back from {value!r}")


def _find(name: str, base: type) -> Any:
    module, _, qualname = str(name).partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    allowed = isinstance(found, type) and issubclass(found, base)
    if not allowed or not (
        dataclasses.is_dataclass(found) or issubclass(found, enum.Enum) or hasattr(found, "_asdict")
    ):
        raise TuningError(
            f"a tactic's class {name!r} is not a dataclass, named tuple or enum of a loaded module"
        )
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Values of runners and tactics as JSON and as keys: readable, the same in every process, never an id().

Plain values (None, bool, int, float, str) are themselves. A tuple is a JSON list; everything else that is not
plain is an object with one key that says what it is: {"list": [...]}, {"dict": [[k, v], ...]}, {"set":
[...]}, {"enum": "module:Class", "name": ...}, {"object": "module:Class", "fields": {...}} for dataclasses and
named tuples, {"name": "module:qualname"} for functions and classes, and {"text": "torch.bfloat16", "type":
...} for dtypes and devices.

A field added to a dataclass would change the JSON, and with it every key written before. One that is declared
with `field(default=..., metadata=OMIT_DEFAULT)`, that is {"omit_default": True}, is left out while it has its
default: keys written before it existed stay valid, and reading fills the default in.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from moestro.errors import TuningError

__all__ = ["OMIT_DEFAULT", "digest", "from_json", "to_json"]

OMIT_DEFAULT = {
    "omit_default": True
}  # metadata of a dataclass field that is not written while at its default

TEXT_TYPES = {
    "dtype",
    "device",
    "layout",
    "memory_format",
    "Size",
}  # of torch; str() says all there is to them


def to_json(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """A JSON value that stands for `value`.

    Raises TypeError for what has no value of its own (an object, a lambda), unless `other` gives what is
    written for it.
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
        return _container(value, other)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name), other) for f in _written_fields(value)}
        return {"object": _name(type(value)), "fields": fields}
    return _opaque(value, other)


def _written_fields(value: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are part of its JSON."""
    return [
        f
        for f in dataclasses.fields(value)
        if not (f.metadata.get("omit_default") and _at_default(f, getattr(value, f.name)))
    ]


def _at_default(field: dataclasses.Field[Any], value: Any) -> bool:
    made = field.default_factory
    default = made() if made is not dataclasses.MISSING else field.default
    return type(value) is type(default) and bool(value == default)


def _container(value: Any, other: Callable[[Any], Any] | None) -> Any:
    """Dictionaries and sets in the order of their JSON, so that equal ones are one key."""
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            fields = {k: to_json(v, other) for k, v in value._asdict().items()}
            return {"object": _name(type(value)), "fields": fields}
        if type(value).__name__ in TEXT_TYPES:
            return [int(v) for v in value]
        return [to_json(v, other) for v in value]
    if isinstance(value, list):
        return {"list": [to_json(v, other) for v in value]}
    if isinstance(value, dict):
        pairs = [[to_json(k, other), to_json(v, other)] for k, v in value.items()]
        return {"dict": sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))}
    return {"set": sorted((to_json(v, other) for v in value), key=json.dumps)}


def _opaque(value: Any, other: Callable[[Any], Any] | None) -> Any:
    kind = type(value)
    package = kind.__module__.split(".")[0]
    if package == "torch" and kind.__name__ in TEXT_TYPES:
        return {"text": str(value), "type": _name(kind)}
    if package == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return to_json(value.item(), other)
    if isinstance(value, pathlib.PurePath):
        return {"text": str(value), "type": "path"}
    if isinstance(value, bytes):
        return {"text": value.hex(), "type": "bytes"}
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return {"name": _name(value)}
    if other is not None:
        return other(value)
    raise TypeError(f"{value!r} of type {_name(kind)} has no value that another process could compare")


def _enum(value: enum.Enum) -> Any:
    return {"enum": _name(type(value)), "name": value.name}


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def from_json(value: Any) -> Any:
    """The value of a tactic that to_json wrote. Raises TuningError for what cannot be made again here.

    Classes are taken from modules that are already imported; nothing is imported for a file's sake.
    """
    try:
        return _made(value)
    except TuningError:
        raise
    except Exception as error:  # whatever a file's values do to a class's constructor, or nested too deeply
        raise TuningError(f"a tactic cannot be read back ({type(error).__name__}: {error})") from error


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [_made(v) for v in value["list"]]
    if "dict" in value:
        return {_made(k): _made(v) for k, v in value["dict"]}
    if "enum" in value:
        return _find(value["enum"], enum.Enum)[value["name"]]
    if "object" in value:
        fields = {k: _made(v) for k, v in value["fields"].items()}
        return _find(value["object"], object)(**fields)
    if "text" in value and "type" in value:
        return _of_text(str(value["text"]), str(value["type"]))
    raise TuningError(f"a tactic cannot be read back from {value!r}")


def _of_text(text: str, kind: str) -> Any:
    """What is written as text: numbers that JSON has not, bytes, paths, torch's dtypes and devices."""
    plain: dict[str, Callable[[str], Any]] = {
        "float": float,
        "bytes": bytes.fromhex,
        "path": pathlib.Path,
    }
    if kind in plain:
        return plain[kind](text)
    torch = sys.modules.get("torch")
    name = kind.rpartition(":")[2]
    if torch is not None and kind.startswith("torch") and name in TEXT_TYPES:
        found = torch.device(text) if name == "device" else getattr(torch, text.removeprefix("torch."), None)
        if type(found).__name__ == name:
            return found
    raise TuningError(f"a tactic's value {text!r} of type {kind!r} cannot be read back")


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

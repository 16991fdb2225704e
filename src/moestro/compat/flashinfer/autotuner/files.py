"""FlashInfer's tuning files: their keys, tactics and metadata, read and written as FlashInfer does.

A file maps str((op, runner class, nearest profile, extras)) to [runner class, tactic]. `_metadata` says where it was
made. What differs there is of two kinds, as in FlashInfer: a definite conflict (another GPU, another cuDNN) is
another environment's file, which is neither served nor overwritten; what either side could not tell is not served,
and replaced when it is next written.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro import machine
from moestro.errors import StoreWarning, TuningError
from moestro.tuning.store.store import write_text_atomically

__all__ = [
    "METADATA",
    "NoFileError",
    "collect_metadata",
    "cudnn_version",
    "hashable",
    "load",
    "mismatches",
    "plain",
    "tactic_of",
    "write",
]

METADATA = "_metadata"
ANYTHING = "*"
UNKNOWN = (None, "unknown", "None")
ALWAYS = ("cuda_version", "gpu")  # compared also where this process cannot tell them

Entries = dict[str, tuple[str, Any]]  # key -> (runner class, tactic)


class NoFileError(TuningError, json.JSONDecodeError):
    """What is no file of theirs; where they raise JSONDecodeError, that is caught too."""

    def __init__(self, path: str, error: Exception) -> None:
        text = f"{path} is not a file of FlashInfer's autotuner: {error}"
        json.JSONDecodeError.__init__(self, text, getattr(error, "doc", ""), getattr(error, "pos", 0))


def plain(tactic: Any) -> Any:
    """A tactic as their JSON has it: sequences of every kind as lists."""
    if isinstance(tactic, str | bytes | dict) or not hasattr(tactic, "__iter__"):
        return int(tactic) if isinstance(tactic, int) and not isinstance(tactic, bool) else tactic
    return [plain(value) for value in tactic]


def tactic_of(value: Any) -> Any:
    """The tactic of their JSON: lists are tuples."""
    return tuple(map(tactic_of, value)) if isinstance(value, list) else value


def hashable(tactic: Any) -> Any:
    """A tactic as an element of a set: sequences of every kind as tuples."""
    return tactic_of(plain(tactic))


def collect_metadata() -> dict[str, str]:
    """What tells one environment from another, as far as it decides what a tactic means."""
    torch = sys.modules.get("torch")
    gpu = None
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(torch.cuda.current_device())
    found = {
        "flashinfer_version": machine.version("flashinfer-python"),
        "cuda_version": getattr(getattr(torch, "version", None), "cuda", None),
        "cudnn_version": cudnn_version(),
        "cudnn_frontend_version": machine.version("nvidia-cudnn-frontend"),
        "gpu": gpu,
    }
    return {name: str(value or "unknown") for name, value in found.items()}


def cudnn_version() -> str:
    """cuDNN's version as torch says it, or else its own frontend; "unknown" where neither can."""
    torch: Any = sys.modules.get("torch")
    cudnn: Any = sys.modules.get("cudnn")
    version = torch.backends.cudnn.version() if torch is not None else None
    with contextlib.suppress(AttributeError, RuntimeError):
        version = version or cudnn.backend_version()
    return str(version or "unknown")


Mismatches = dict[str, tuple[Any, str]]  # fact -> (the file's, ours)


def mismatches(saved: Any, now: Mapping[str, str]) -> tuple[Mismatches, Mismatches]:
    """(definite conflicts, what one side could not tell), of the facts in `now`; "*" agrees with everything."""
    known = saved if isinstance(saved, Mapping) else {}
    different = {
        name: (known.get(name), value)
        for name, value in now.items()
        if known.get(name) not in (value, ANYTHING) and value != ANYTHING
    }
    soft = {name: pair for name, pair in different.items() if pair[0] in UNKNOWN or pair[1] in UNKNOWN}
    return {name: pair for name, pair in different.items() if name not in soft}, soft


def _here() -> dict[str, str]:
    """The facts that a file is held against: what this process cannot tell does not count, but GPU and CUDA do."""
    return {
        name: value for name, value in collect_metadata().items() if name in ALWAYS or value not in UNKNOWN
    }


def _data(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise NoFileError(path, error) from error
    if not isinstance(data, dict):
        raise NoFileError(path, TypeError(f"it holds a {type(data).__name__}, not an object"))
    return data


def _entries(path: str, data: Mapping[str, Any]) -> Entries:
    try:
        found = {key: tuple(value) for key, value in data.items() if not key.startswith("_")}
        return {key: (str(runner), tactic_of(tactic)) for key, (runner, tactic) in found.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise NoFileError(path, error) from error


def write(path: str, entries: Mapping[str, tuple[str, Any]]) -> bool:
    """Write these entries, whole or not at all, beside what a file of this environment holds.

    False, with one warning, where the file is another environment's. Raises OSError.
    """
    data: dict[str, Any] = {METADATA: collect_metadata()}
    try:
        there = _data(path)
        hard, soft = mismatches(there.get(METADATA), _here()) if METADATA in there else ({}, {})
        if hard:
            _warn(path, hard, "is not overwritten")
            return False
        if not soft:
            data |= there
    except (FileNotFoundError, NoFileError):
        pass  # nothing of it can be kept
    data |= {key: [runner, plain(tactic)] for key, (runner, tactic) in sorted(entries.items())}
    write_text_atomically(Path(path).absolute(), json.dumps(data, indent=2))
    return True


def load(path: str) -> Entries | None:
    """The entries of a file, or None, with one warning, if it was made elsewhere; one without metadata serves.

    Raises FileNotFoundError, or TuningError for what is no such file.
    """
    data = _data(path)
    if METADATA in data:
        hard, soft = mismatches(data[METADATA], _here())
        if hard or soft:
            _warn(path, hard | soft, "is not used")
            return None
    return _entries(path, data)


def _warn(path: str, different: Mismatches, what: str) -> None:
    text = ", ".join(f"{k}: {saved!r} there, {now!r} here" for k, (saved, now) in different.items())
    warnings.warn(f"{path} was made in another environment ({text}); it {what}", StoreWarning, stacklevel=4)

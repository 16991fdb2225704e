"""FlashInfer's tuning files: their keys, tactics and metadata, read and written as FlashInfer does.

A file maps str((op, runner class, nearest profile, extras)) to [runner class, tactic]. `_metadata` says where it
was made; a file of another GPU or CUDA is not served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.store.store import write_text_atomically

__all__ = ["METADATA", "collect_metadata", "hashable", "mismatches", "plain", "read", "tactic_of", "write"]

METADATA = "_metadata"
UNKNOWN = (None, "unknown", "None")


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
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    gpu = None
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(torch.cuda.current_device())
    return {"cuda_version": cuda or "unknown", "gpu": gpu or "unknown"}


def mismatches(saved: Any) -> dict[str, tuple[Any, str]]:
    """Fact -> (the file's, ours), where they differ and the file does not say "*"."""
    known = saved if isinstance(saved, Mapping) else {}
    now = collect_metadata()
    return {key: (known.get(key), value) for key, value in now.items() if known.get(key) not in (value, "*")}


def read(path: str) -> tuple[dict[str, tuple[str, Any]], Any]:
    """(entries, metadata) of a file. Raises FileNotFoundError, or TuningError for what is no such file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {
            key: (str(value[0]), tactic_of(value[1]))
            for key, value in data.items()
            if not key.startswith("_") and len(value) == 2
        }
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise TuningError(f"{path} is not a file of FlashInfer's autotuner: {error}") from error
    return entries, data.get(METADATA)


def write(path: str, entries: Mapping[str, tuple[str, Any]]) -> None:
    """Write a file of these entries, whole or not at all. Raises OSError."""
    data = {METADATA: collect_metadata(), **{key: [r, plain(t)] for key, (r, t) in sorted(entries.items())}}
    write_text_atomically(Path(path).absolute(), json.dumps(data, indent=2))

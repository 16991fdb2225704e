"""FlashInfer's tuning files as hints: their winners are tried first here, and still have to win.

A FlashInfer file (autotune(cache=...)) maps the text of (op, runner class, profile) or, today, (op, runner
class, profile, extras) to [runner class, tactic]; entries whose names begin with `_` (metadata, generation,
records of products) stand beside. Its shapes are bucketed by another scheme and its times were taken by another
clock, so nothing of it is served; but a tactic that won there is a good first candidate.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.evidence import SCHEMA, Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.runner import tactic_key
from moestro.tuning.spec.tactic_list import class_name
from moestro.tuning.store.store import Store, write_atomically

__all__ = ["hints_for", "import_flashinfer"]

FOLDER = "hints"


def import_flashinfer(path: Path, store: Store) -> int:
    """Take the winners of a FlashInfer file into a store as hints; how many.

    Raises TuningError if the file is none or the store cannot be written.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        hints = [_hint(key, value) for key, value in data.items() if not key.startswith("_")]
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, RecursionError) as error:
        raise TuningError(f"{path} is not a file of FlashInfer's autotuner: {error}") from error
    if not hints:
        raise TuningError(f"{path} holds no tactics")
    target = store.root / FOLDER / f"{path.stem}.json"
    try:
        write_atomically(target, {"schema": SCHEMA, "kind": "hints", "hints": hints})
    except OSError as error:
        raise TuningError(f"{target} cannot be written: {error}") from error
    return len(hints)


def _hint(key: str, value: Any) -> Mapping[str, Any]:
    """An entry: its extras hold dtypes and the like, which are no literals, and are not needed here."""
    parts = ast.parse(key, mode="eval").body
    if not isinstance(parts, ast.Tuple) or len(parts.elts) not in (3, 4):
        raise ValueError(f"entry {key!r} must be of 3 or 4 parts")
    op, runner, profile = (ast.literal_eval(part) for part in parts.elts[:3])
    if not isinstance(op, str) or not isinstance(runner, str) or not isinstance(value, list | tuple):
        raise ValueError(f"entry {key!r}")
    if len(value) != 2 or not isinstance(value[0], str):
        raise ValueError(f"entry {key!r} must be [runner, tactic], got {value!r}")
    return {"op": op, "runner": value[0], "tactic": value[1], "profile": [list(s) for s in profile]}


def hints_for(root: Path, key: StaticKey) -> list[Record]:
    """The hints of a store for a key, as records that only name a candidate of the same op and class."""
    wanted = {class_name(name): name for name in key.runners}
    found: dict[str, Record] = {}
    for path in sorted(_files(root / FOLDER)):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for hint in data["hints"]:
                if hint["op"] == key.op and hint["runner"] in wanted:
                    tactic = _tuples(hint["tactic"])
                    tactic_key(tactic, None)
                    record = Record((), wanted[hint["runner"]], tactic, "default")
                    found.setdefault(json.dumps([hint["runner"], hint["tactic"]]), record)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, TuningError):
            continue  # hints are worth no warning
    return list(found.values())


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix == ".json"]
    except (OSError, ValueError):
        return []


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

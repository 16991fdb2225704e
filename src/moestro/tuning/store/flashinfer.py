"""FlashInfer's tuning files as hints: their winners are tried first here, and still have to win.

A FlashInfer file (autotune(cache=...)) maps the text of (op, runner class, profile) to [runner class,
tactic], with a `_metadata` entry beside. Its shapes are bucketed by another scheme and its times were taken
by another clock, so nothing of it is served; but a tactic that won there is a good first candidate.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.store.records import SCHEMA, Record
from moestro.tuning.store.store import Store, write_atomically

__all__ = ["hints_for", "import_flashinfer"]

FOLDER = "hints"


def import_flashinfer(path: Path, store: Store) -> int:
    """Take the winners of a FlashInfer file into a store as hints; how many.

    Raises TuningError if the file is none or the store cannot be written.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        hints = [_hint(key, value) for key, value in data.items() if key != "_metadata"]
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError) as error:
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
    op, runner, profile = ast.literal_eval(key)
    if (
        not isinstance(op, str)
        or not isinstance(runner, str)
        or not isinstance(value, list)
        or len(value) != 2
    ):
        raise ValueError(f"entry {key!r}")
    return {"op": op, "runner": str(value[0]), "tactic": value[1], "profile": [list(s) for s in profile]}


def hints_for(root: Path, key: StaticKey) -> list[Record]:
    """The hints of a store for a key, as records that only name a candidate of the same op and class."""
    wanted = {name.partition("#")[0].rpartition(".")[2]: name for name in key.runners}
    found: dict[str, Record] = {}
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for hint in data["hints"]:
                if hint["op"] == key.op and hint["runner"] in wanted:
                    tactic = _tuples(hint["tactic"])
                    record = Record((), wanted[hint["runner"]], tactic, "default")
                    found.setdefault(json.dumps([hint["runner"], hint["tactic"]]), record)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # hints are worth no warning
    return list(found.values())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

"""The files of a recording, written anew after every step, and a console that stays short.

    OUT/bundle.json   slim: what was decided here for good, and beside it what the shipped bundle of this GPU has for
                      other layers and sizes. Copied to src/moestro/tuning/bundles/h200.json it ships
    OUT/tuning.json   what was decided here, with all evidence: what `moestro bench recall` reads
    OUT/record.json   results of `moestro bench` by step and routing, one a line
    OUT/log.txt       everything that was printed: by us, by libraries, tracebacks

Nothing that ends the process loses what was written: each file is written beside itself and renamed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro.bench import results
from moestro.bench.results import BenchResult
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.store import shipped
from moestro.tuning.store.bundle import write_bundle
from moestro.tuning.store.store import Entry, Store, write_text_atomically

SCHEMA = "moestro.record/1"
LOOSE = ("mode", "cuda_graph", "expert_offset")  # facts of a key that a shipped bundle may be laxer about
WIDTH, MOST = 200, 11_500  # characters of a line, and of all: a lent machine returns the last 12,000


class Console:
    """Says lines on the process's first stdout, cut to WIDTH, MOST in all; what anybody else prints goes to a file."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("a", buffering=1)
        self._out, self._said = os.fdopen(os.dup(1), "w", buffering=1), 0
        self._before = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(self._log.fileno(), stream)

    def __call__(self, text: str) -> None:
        print(text, file=self._log)
        if self._said >= MOST:
            return
        self._said += min(len(text), WIDTH) + 1
        print(text[:WIDTH] if self._said < MOST else "more is in log.txt", file=self._out)

    def failed(self, what: str, error: BaseException) -> None:
        """One line, and the traceback to the file."""
        first = next(iter(str(error).strip().splitlines()), "")
        self(f"{what}: FAILED {type(error).__name__}: {first}")
        traceback.print_exception(error, file=self._log)

    def close(self) -> None:
        """Give stdout and stderr back."""
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in enumerate(self._before, 1):
            os.dup2(before, stream)
            os.close(before)
        self._out.close()
        self._log.close()


class Recorder:
    """Keeps OUT up to date; goes on with a record that is there."""

    def __init__(self, out: Path, store: Path) -> None:
        self.out, self.store = out, Store(store)
        self._shipped = shipped.bundles()  # before anybody hides them
        self._found: dict[str, dict[str, Any]] = {}
        record = out / "record.json"
        if record.exists():
            self._found = json.loads(record.read_text())["results"]

    def keep(self, step: str, found: Sequence[BenchResult]) -> None:
        """Results of a step so far, by routing."""
        for result in found:
            name = f"{step} {result.conditions['routing']}"
            self._found[name] = _short({"schema": results.SCHEMA, **asdict(result)})
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in self._found.items())
        write_text_atomically(
            self.out / "record.json", f'{{"schema": "{SCHEMA}", "results": {{\n{rows}\n}}}}\n'
        )

    def export(self) -> int:
        """The bundle and the evidence; how many decisions were made here."""
        fresh = self.store.entries(("decision", "quarantine"))
        decisions = sum(entry.kind == "decision" for entry in fresh)
        if not decisions:
            return 0
        facts: dict[str, Mapping[str, Any]] = {
            name: self.store.facts(name) for name in sorted({e.environment for e in fresh})
        }
        write_bundle(self.out / "tuning.json", fresh, facts)
        devices = {str(f.get("device")) for f in facts.values()}
        fresh = shippable(fresh)
        for bundle in self._shipped:
            if devices & {str(f.get("device")) for f in bundle.environments.values()}:
                fresh = merged(bundle.entries, fresh)
                facts = {**bundle.environments, **facts}
        write_bundle(self.out / "bundle.json", fresh, facts, slim=True, loose=LOOSE)
        return decisions


def shippable(entries: Sequence[Entry]) -> list[Entry]:
    """What serves well on its own: layers decided from one token on, in which no unfinished race has beaten the default.

    A winner answers for all smaller sizes down to the next that is decided: of gpt-oss-20b only 256, 1024 and 16384
    tokens once shipped, and one token took 48 µs for the default's 32 (H200).
    """
    kept: list[Entry] = []
    for _, layer in itertools.groupby(sorted(entries, key=_layer), key=_layer):
        ours = list(layer)
        records = [entry.data["record"] for entry in ours if entry.kind == "decision"]
        raced = [record for record in records if not record.get("learned")]
        from_one = any(set(record["bucket"]) <= {1} for record in raced)
        if from_one and all(record["tactic"] == -1 or record.get("complete", True) for record in raced):
            kept += (entry for entry in ours if not _unfinished_point(entry))
    return kept


def _unfinished_point(entry: Entry) -> bool:
    """Whether an entry is a point between buckets whose race did not end."""
    record = entry.data.get("record", {})
    return bool(record.get("learned") and not record.get("complete", True))


def _layer(entry: Entry) -> tuple[str, str]:
    return entry.environment, StaticKey.from_fields(entry.key).text


def merged(base: Iterable[Entry], fresh: Sequence[Entry]) -> list[Entry]:
    """The fresh entries, after those of the base that are of other layers or other sizes."""
    mine = {_place(entry) for entry in fresh}
    return [*(entry for entry in base if _place(entry) not in mine), *fresh]


def _place(entry: Entry) -> tuple[str, str, str]:
    """What an entry is about: kind, key, and size or candidate."""
    about = entry.data["record"]["bucket"] if entry.kind == "decision" else entry.data["candidate"]
    return (
        entry.kind,
        StaticKey.from_fields(entry.key).text,
        str(list(about) if entry.kind == "decision" else about),
    )


def _short(value: Any) -> Any:
    """JSON with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list | tuple) else value


def microseconds(seconds: float | None) -> str:
    """Of one figure of a line."""
    if seconds is None:
        return "-"
    us = seconds * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def lines(step: str, result: BenchResult, tokens: Sequence[int]) -> list[str]:
    """A result on the console: a line a contender, µs by number of tokens; and a line a contender that is missing."""
    said = []
    for name in result.contenders:
        rows = [result.row(name, n) for n in tokens]
        figures = " ".join(microseconds(row.median_s if row else None) for row in rows)
        errors = [row.error for row in rows if row and row.error is not None]
        exact = [row.exact_error for row in rows if row and row.exact_error is not None]
        ends = [f"{what} {max(some):.1e}" for what, some in (("error", errors), ("exact", exact)) if some]
        said.append(" | ".join([f"{step} {result.conditions['routing']}", name, figures, *ends]))
    missing = {entry["contender"]: entry for entry in reversed([*result.skipped, *result.failed])}
    for name, entry in missing.items():
        where = "" if entry["tokens"] is None else f" at N = {entry['tokens']}"
        said.append(f"{step} without {name}{where}: {entry['reason']}")
    return said

"""Decisions as tables: what bundles and recorded evidence are written as.

    {"schema": 2, "kind": "bundle", "created": ..., "loose": [...], "environments": {name: facts},
     "keys": [...], "tactics": [...], "policies": [...], "texts": [...],
     "columns": {kind: names}, "rows": [one list a line]}

Keys, tactics, policies and texts (runners, reasons, probes ...) stand once and are named by their place. A row's
first element says what it is: "decision", then the "candidate" rows of its evidence; "default" is a whole range
of buckets at which the default was kept, without evidence; "quarantine". Measured numbers have four significant
digits. What a record has besides the columns, and is not empty, stands in the last column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.evidence import SCHEMA
from moestro.tuning.store.store import Entry

__all__ = ["TABLE_SCHEMA", "entries_of", "table_of", "text_of"]

TABLE_SCHEMA = 2
COLUMNS = {
    "decision": "environment key bucket runner tactic status probes tuned_for learned complete created "
    "noise_floor samples seconds clock policy reason more",
    "candidate": "runner tactic fate samples median spread ratio low high reason probes",
    "default": "environment key runner probes clock policy created buckets tuned_for",
    "quarantine": "environment key candidate reason created",
}
RECORD = ("bucket", "runner", "tactic", "status", "probes", "tuned_for", "learned", "complete", "created")
EVIDENCE = ("candidates", "noise_floor", "samples", "seconds", "clock", "policy", "reason")
KEPT = "the default was kept"


class _Pool:
    """Values that stand once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        text = json.dumps(value, sort_keys=True)
        if text not in self._places:
            self._places[text] = len(self.values)
            self.values.append(value)
        return self._places[text]


# --- writing -----------------------------------------------------------------------------------------
def table_of(entries: Iterable[Entry], *, slim: bool = False) -> dict[str, Any]:
    """The tables of decisions and quarantine. slim: decisions that keep the default as ranges of buckets, and of
    the others' evidence the winner and the default only.
    """
    pools = {name: _Pool() for name in ("keys", "tactics", "policies", "texts")}
    rows: list[list[Any]] = []
    kept: dict[tuple[Any, ...], list[Any]] = {}
    for entry in entries:
        where = [entry.environment, pools["keys"].place(entry.key)]
        if entry.kind == "quarantine":
            said = [str(entry.data["candidate"]), str(entry.data["reason"])]
            rows.append(["quarantine", *where, *said, int(entry.created)])
        elif slim and _keeps_default(entry):
            _add_kept(kept, where, entry.data["record"], pools)
        else:
            rows += _decision(where, entry.data["record"], pools, slim)
    rows += [
        ["default", *at, created, sorted(buckets), tuned] for at, (created, buckets, tuned) in kept.items()
    ]
    return {
        **{name: pool.values for name, pool in pools.items()},
        "columns": {kind: names.split() for kind, names in COLUMNS.items()},
        "rows": rows,
    }


def _keeps_default(entry: Entry) -> bool:
    record = entry.data["record"]
    return bool(record["tactic"] == -1 and record["status"] == "measured" and record.get("complete", True))


def _add_kept(
    kept: dict[tuple[Any, ...], list[Any]],
    where: list[Any],
    record: Mapping[str, Any],
    pools: Mapping[str, _Pool],
) -> None:
    texts, evidence = pools["texts"], record["evidence"]
    at = (
        *where,
        texts.place(record["runner"]),
        texts.place(list(record.get("probes", ()))),
        texts.place(evidence.get("clock", "")),
        pools["policies"].place(evidence.get("policy", {})),
    )
    known = kept.setdefault(at, [0, [], []])
    known[0] = max(known[0], int(record["created"]))
    known[1].append(list(record["bucket"]))
    known[2] = max(known[2], list(record.get("tuned_for", ())))


def _decision(
    where: list[Any], record: Mapping[str, Any], pools: Mapping[str, _Pool], slim: bool
) -> Iterator[list[Any]]:
    texts, tactics = pools["texts"].place, pools["tactics"].place
    evidence = record["evidence"]
    more = {
        "record": {k: v for k, v in record.items() if k not in (*RECORD, "evidence", "environment") and v},
        "evidence": {k: v for k, v in evidence.items() if k not in EVIDENCE and v},
    }
    if slim:
        more["record"].pop("samples", None)
    yield [
        "decision",
        *where,
        list(record["bucket"]),
        texts(record["runner"]),
        tactics(record["tactic"]),
        texts(record["status"]),
        texts(list(record.get("probes", ()))),
        list(record.get("tuned_for", ())),
        int(record.get("learned", False)),
        int(record.get("complete", True)),
        int(record["created"]),
        _rounded(evidence.get("noise_floor", 0.0)),
        evidence.get("samples", 0),
        _rounded(evidence.get("seconds", 0.0)),
        texts(evidence.get("clock", "")),
        pools["policies"].place({} if slim else evidence.get("policy", {})),
        texts(evidence.get("reason", "")),
        {kind: found for kind, found in more.items() if found},
    ]
    for c in evidence["candidates"]:
        if slim and not (c["fate"] == "winner" or c["tactic"] == -1):
            continue
        numbers = [_rounded(c.get(name)) for name in ("median", "spread", "ratio", "low", "high")]
        probes = {
            texts(name): [_rounded(known.get("median")), _rounded(known.get("ratio"))]
            for name, known in c.get("probes", {}).items()
        }
        told = [texts(c["runner"]), tactics(c["tactic"]), texts(c["fate"]), c.get("samples", 0)]
        yield ["candidate", *told, *numbers, texts(c.get("reason", "")), list(map(list, probes.items()))]


def _rounded(value: Any) -> Any:
    """Four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def text_of(data: Mapping[str, Any]) -> str:
    """A table's JSON, one row or value a line."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- reading -----------------------------------------------------------------------------------------
def entries_of(data: Mapping[str, Any], path: Path) -> list[Entry]:
    """The entries of a table, as a store's files have them. Raises KeyError, IndexError, TypeError, ValueError or
    TuningError for what is none.
    """
    entries: list[Entry] = []
    for row in data["rows"]:
        kind, *values = row
        if kind not in COLUMNS:
            raise TuningError(f"a row is {kind!r}, which is none of {', '.join(COLUMNS)}")
        fields = dict(zip(COLUMNS[kind].split(), values, strict=True))
        if kind == "candidate":
            entries[-1].data["record"]["evidence"]["candidates"].append(_candidate(fields, data))
        else:
            entries += _READERS[kind](fields, data, path)
    return entries


def _entry(fields: Mapping[str, Any], kind: str, data: Mapping[str, Any], path: Path, **more: Any) -> Entry:
    key = data["keys"][fields["key"]]
    whole = {"schema": SCHEMA, "kind": kind, "op": key["op"], "key": key, **more}
    return Entry(path, str(fields["environment"]), kind, str(key["op"]), key, whole)


def _read_decision(fields: dict[str, Any], data: Mapping[str, Any], path: Path) -> list[Entry]:
    texts, more = data["texts"], fields["more"]
    evidence = {
        "candidates": [],
        "noise_floor": fields["noise_floor"],
        "samples": fields["samples"],
        "seconds": fields["seconds"],
        "clock": texts[fields["clock"]],
        "policy": data["policies"][fields["policy"]],
        "reason": texts[fields["reason"]],
        **more.get("evidence", {}),
    }
    record = {
        **{name: fields[name] for name in ("bucket", "tuned_for", "created")},
        "runner": texts[fields["runner"]],
        "tactic": data["tactics"][fields["tactic"]],
        "status": texts[fields["status"]],
        "probes": texts[fields["probes"]],
        "learned": bool(fields["learned"]),
        "complete": bool(fields["complete"]),
        "environment": fields["environment"],
        "evidence": evidence,
        **more.get("record", {}),
    }
    return [_entry(fields, "decision", data, path, record=record)]


def _candidate(fields: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    texts = data["texts"]
    numbers = {name: fields[name] for name in ("samples", "median", "spread", "ratio", "low", "high")}
    return {
        "runner": texts[fields["runner"]],
        "tactic": data["tactics"][fields["tactic"]],
        "fate": texts[fields["fate"]],
        **numbers,
        "reason": texts[fields["reason"]],
        "probes": {texts[at]: {"median": median, "ratio": ratio} for at, (median, ratio) in fields["probes"]},
    }


def _read_default(fields: Mapping[str, Any], data: Mapping[str, Any], path: Path) -> list[Entry]:
    texts = data["texts"]
    last = fields["buckets"][-1]
    return [
        _entry(
            fields,
            "decision",
            data,
            path,
            record={
                "bucket": bucket,
                "runner": texts[fields["runner"]],
                "tactic": -1,
                "status": "measured",
                "probes": texts[fields["probes"]],
                "tuned_for": fields["tuned_for"] if bucket == last else [],
                "learned": False,
                "complete": True,
                "created": fields["created"],
                "environment": fields["environment"],
                "evidence": {
                    "candidates": [],
                    "clock": texts[fields["clock"]],
                    "policy": data["policies"][fields["policy"]],
                    "reason": KEPT,
                },
            },
        )
        for bucket in fields["buckets"]
    ]


def _read_quarantine(fields: Mapping[str, Any], data: Mapping[str, Any], path: Path) -> list[Entry]:
    told = {name: fields[name] for name in ("candidate", "reason", "created")}
    return [_entry(fields, "quarantine", data, path, **told)]


_READERS: dict[str, Callable[[Any, Mapping[str, Any], Path], list[Entry]]] = {
    "decision": _read_decision,
    "default": _read_default,
    "quarantine": _read_quarantine,
}

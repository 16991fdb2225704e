"""Decisions in one file: to bake into an image, to send to somebody, to ship with the package.

A bundle holds the files of a store with the facts of their environments, as tables (tables.py). A slim one has the
evidence of winners and defaults only, and of decisions that keep the default no more than their sizes. `loose`
names facts of keys that a bundle which ships with the package may be laxer about (shipped.py). Bundles of before
(schema 1: a store's files in a list) are read as well; `moestro cache convert` writes them anew.
"""

from __future__ import annotations

import fnmatch
import json
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import StoreWarning, TuningError
from moestro.tuning.spec.evidence import SCHEMA, Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.store import Entry, Store, created, write_text_atomically
from moestro.tuning.store.tables import TABLE_SCHEMA, entries_of, table_of, text_of

__all__ = [
    "Bundle",
    "Difference",
    "convert",
    "diff",
    "export_bundle",
    "import_bundle",
    "prune",
    "read_bundle",
    "read_entries",
    "write_bundle",
]

BUNDLE_KINDS = ("decision", "quarantine")


@dataclass(frozen=True)
class Bundle:
    """A bundle's file as read."""

    path: Path
    created: float  # seconds since 1970
    environments: Mapping[str, Mapping[str, Any]]  # facts by name
    entries: tuple[Entry, ...]
    loose: tuple[str, ...] = ()


def export_bundle(
    store: Store,
    path: Path,
    environments: Iterable[str] = ("*",),
    op: str = "*",
    *,
    slim: bool = False,
    loose: Iterable[str] = (),
) -> int:
    """Write the decisions and quarantine of a store to one file; how many decisions. Patterns as in a shell.

    Raises TuningError if nothing matches or the file cannot be written.
    """
    patterns = tuple(environments)
    entries = [
        entry
        for entry in store.entries(BUNDLE_KINDS)
        if fnmatch.fnmatchcase(entry.op, op)
        and any(fnmatch.fnmatchcase(entry.environment, pattern) for pattern in patterns)
    ]
    decisions = sum(entry.kind == "decision" for entry in entries)
    if not decisions:
        raise TuningError(f"{store.root} has no decisions of environments {', '.join(patterns)} and op {op}")
    names = sorted({entry.environment for entry in entries})
    environments_ = {name: store.facts(name) for name in names}
    write_bundle(path, entries, environments_, slim=slim, loose=loose)
    return decisions


def write_bundle(
    path: Path,
    entries: Iterable[Entry],
    environments: Mapping[str, Mapping[str, Any]],
    *,
    slim: bool = False,
    loose: Iterable[str] = (),
    created: float | None = None,
) -> None:
    """Write entries to one file. Raises TuningError if that cannot be."""
    data = {
        "schema": TABLE_SCHEMA,
        "kind": "bundle",
        "created": int(time.time() if created is None else created),
        "loose": list(loose),
        "environments": dict(environments),
        **table_of(entries, slim=slim),
    }
    try:
        write_text_atomically(path.absolute(), text_of(data))
    except OSError as error:
        raise TuningError(f"{path} cannot be written: {error}") from error


def convert(source: Path, target: Path, *, slim: bool = False) -> int:
    """Write a bundle of any schema anew; how many decisions. Raises TuningError if it cannot be read or written."""
    bundle = read_bundle(source)
    write_bundle(
        target,
        bundle.entries,
        bundle.environments,
        slim=slim,
        loose=bundle.loose,
        created=bundle.created,
    )
    return sum(entry.kind == "decision" for entry in bundle.entries)


def import_bundle(path: Path, store: Store) -> tuple[int, int]:
    """Take a bundle's entries into a store; (taken, left out because the store's own are as new).

    Raises TuningError if the file is no bundle or the store cannot be written.
    """
    bundle = read_bundle(path)
    taken = left = 0
    for entry in bundle.entries:
        environment = Environment(bundle.environments.get(entry.environment, {}), entry.environment)
        if store.put_entry(environment, entry):
            taken += 1
        else:
            left += 1
    return taken, left


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's file. Tactics are not made yet: their classes may not be loaded.

    Raises TuningError if it is none that this version reads.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != "bundle" or data["schema"] not in (SCHEMA, TABLE_SCHEMA):
            raise ValueError(f"kind {data['kind']!r}, schema {data['schema']!r}")
        entries = _listed(data, path) if data["schema"] == SCHEMA else entries_of(data, path)
        for entry in entries:
            if entry.kind == "decision":
                Record.unmade(entry.data["record"])
        return Bundle(
            path,
            float(data["created"]),
            dict(data["environments"]),
            tuple(entries),
            tuple(map(str, data.get("loose", ()))),
        )
    except Exception as error:  # whatever a file's content does
        raise TuningError(
            f"{path} is not a bundle that this version reads: {type(error).__name__}: {error}"
        ) from error


def _listed(data: Mapping[str, Any], path: Path) -> list[Entry]:
    """The entries of a bundle of schema 1."""
    entries = []
    for e in data["entries"]:
        key = data["keys"][e["key"]] if isinstance(e["key"], int) else e["key"]
        entries.append(Entry(path, str(e["environment"]), e["kind"], str(e["op"]), key, {**e, "key": key}))
    return entries


def read_entries(source: Path, kinds: Iterable[str] = ("decision",)) -> list[Entry]:
    """The entries of a store's folder or of a bundle's file."""
    if source.is_dir():
        return Store(source).entries(kinds)
    wanted = set(kinds)
    return [entry for entry in read_bundle(source).entries if entry.kind in wanted]


@dataclass(frozen=True)
class Difference:
    """One bucket that two sources answer differently; None where one of them has no answer."""

    op: str
    key: str
    bucket: tuple[int, ...]
    probes: tuple[str, ...]
    one: Record | None
    other: Record | None


def diff(one: Path, other: Path, op: str = "*") -> tuple[list[Difference], int]:
    """(what differs, how many buckets agree) between two stores or bundles.

    Environments are set against each other where both sides have the same; else each side's newest decision
    counts.
    """
    sides = [_winners(read_entries(path), op) for path in (one, other)]
    shared = {env for env, *_ in sides[0]} & {env for env, *_ in sides[1]}
    if not shared:
        sides = [{("", *where[1:]): record for where, record in side.items()} for side in sides]
    else:
        sides = [{where: r for where, r in side.items() if where[0] in shared} for side in sides]
    different, same = [], 0
    for where in sorted({*sides[0], *sides[1]}, key=str):
        left, right = sides[0].get(where), sides[1].get(where)
        if left is not None and right is not None and _choice(left) == _choice(right):
            same += 1
            continue
        _, name, key, bucket, probes = where
        different.append(Difference(name, key, bucket, probes, left, right))
    return different, same


def _winners(entries: Iterable[Entry], op: str) -> dict[tuple[Any, ...], Record]:
    found: dict[tuple[Any, ...], Record] = {}
    for entry in sorted(entries, key=lambda e: e.created):
        if fnmatch.fnmatchcase(entry.op, op):
            try:
                record, key = entry.record, StaticKey.from_fields(entry.key).text
            except Exception as error:  # whatever a file's content does
                warnings.warn(f"{entry.path}: {error}; not compared", StoreWarning, stacklevel=3)
                continue
            found[entry.environment, entry.op, key, record.bucket, record.probes] = record
    return found


def _choice(record: Record) -> tuple[str, Any]:
    return record.runner, record.tactic


def prune(
    store: Store,
    *,
    environments: Iterable[str] = (),
    older_than_days: float | None = None,
    kinds: Iterable[str] = ("decision", "quarantine", "miss"),
    op: str = "*",
    dry_run: bool = False,
) -> list[Path]:
    """Delete files of a store, or only list them: those of these environments (patterns; none: all) and
    kinds, at least so old. What is not a readable file of a store is never touched. Raises TuningError
    without any condition, or where a file cannot be deleted.
    """
    patterns, kinds = tuple(environments), tuple(kinds)
    if not patterns and older_than_days is None and op == "*" and len(kinds) == 3:
        raise TuningError("prune needs a condition: an environment, an age, an op or a kind")
    limit = float("inf") if older_than_days is None else time.time() - older_than_days * 86400
    doomed = [
        entry.path
        for entry in store.entries(kinds)
        if fnmatch.fnmatchcase(entry.op, op)
        and (not patterns or any(fnmatch.fnmatchcase(entry.environment, p) for p in patterns))
        and created(entry.data) <= limit
    ]
    try:
        for path in () if dry_run else doomed:
            path.unlink(missing_ok=True)
            _remove_empty(path.parent, store.root)
    except OSError as error:
        raise TuningError(f"the store {store.root} cannot be pruned: {error}") from error
    return doomed


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove a key's folder once it is empty, and its environment's once only the facts are left."""
    if folder != root and not any(folder.iterdir()):
        folder.rmdir()
        home = folder.parent
        if home != root and {p.name for p in home.iterdir()} == {"environment.json"}:
            (home / "environment.json").unlink()
            home.rmdir()

"""Decisions that ship with the package: what serves a fresh install before anything is tuned.

Bundles in the package's `bundles` folder are used in three ways, by how near they are:
  the same environment and key   as if it stood in the store: a tuning has nothing to add
  the same GPU and kernels       where only driver, CUDA, torch or Triton differ, or those facts of the key
                                 that the bundle calls loose (CUDA graph or eager, say): it serves until
                                 something is tuned here, and a tuning measures again
  anything else                  winners are tried first when something is tuned, as those of any environment

Kernels are the same if their sources are (environment fact "sources"): a bundle of older kernels never serves.
`moestro doctor` says which of the three holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.store.bundle import Bundle, read_bundle
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.notices import notice
from moestro.tuning.store.store import Entry

__all__ = ["bundles", "forget", "hints", "serving"]

FOLDER = Path(__file__).parents[1] / "bundles"
SAME_GPU = ("device", "capability", "sources")  # facts that must agree for a decision to serve
SOFTWARE = ("driver", "cuda", "torch", "triton")


@functools.cache
def bundles() -> tuple[Bundle, ...]:
    """The package's bundles; one that cannot be read is left out, with a warning."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        try:
            found.append(read_bundle(path))
        except TuningError as error:
            notice(str(error))
    return tuple(found)


@dataclass(frozen=True)
class _Indexed:
    """A bundle's decisions by what must agree of their keys."""

    bundle: Bundle
    entries: Mapping[str, list[Entry]]


@functools.cache
def _indexed() -> tuple[_Indexed, ...]:
    indexed = []
    for bundle in bundles():
        by_key: dict[str, list[Entry]] = {}
        texts: dict[int, str] = {}  # a key is shared by many entries
        for entry in bundle.entries:
            if entry.kind == "decision":
                text = texts.get(id(entry.key)) or _strict(entry.key, bundle.loose)
                texts[id(entry.key)] = text
                by_key.setdefault(text, []).append(entry)
        indexed.append(_Indexed(bundle, by_key))
    return tuple(indexed)


def forget() -> None:
    """Read the bundles again when they are next asked for."""
    bundles.cache_clear()
    _indexed.cache_clear()


def _strict(fields: Mapping[str, Any], loose: Iterable[str]) -> str:
    """A digest of a key without the facts of these names, wherever in it they stand."""
    names = frozenset(loose)

    def less(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: less(v) for k, v in value.items() if k not in names}
        return [less(v) for v in value] if isinstance(value, list) else value

    return digest(less(fields))


def _found(key: StaticKey, arity: int) -> Iterator[tuple[Bundle, Entry, Record]]:
    """Decisions for a key, with its own names of the runners. What cannot be made here is left out."""
    for known in _indexed():
        if not known.entries:
            continue
        for entry in known.entries.get(_strict(key.fields, known.bundle.loose), ()):
            theirs = StaticKey.from_fields(entry.key).runners
            try:
                record = entry.record
                runner = key.runners[theirs.index(record.runner)]
            except (TuningError, TypeError, KeyError, ValueError, IndexError):
                continue  # a tactic or runner of other kernels
            if len(record.bucket) != arity:
                continue
            yield known.bundle, entry, replace(record, runner=runner, environment=entry.environment)


def serving(key: StaticKey, environment: Environment, arity: int = 1) -> Iterator[tuple[str, Record]]:
    """(where from, decision) for what may serve a key in an environment; one that a tuning should measure
    again is not `complete`.
    """
    for bundle, entry, record in _found(key, arity):
        name = f"bundle {bundle.path.stem}"
        if entry.environment == environment.name and digest(entry.key) == key.text:
            yield name, record
            continue
        facts = bundle.environments.get(entry.environment, {})
        if all(facts.get(fact) == environment.facts.get(fact) for fact in SAME_GPU):
            other = [f"{f} {facts.get(f)}" for f in SOFTWARE if facts.get(f) != environment.facts.get(f)] or [
                "another mode"
            ]
            yield f"{name}, of {', '.join(other)}", replace(record, complete=False)


def hints(key: StaticKey, arity: int = 1) -> list[Record]:
    """Winners for a key anywhere: worth trying first."""
    return [record for _, _, record in _found(key, arity)]

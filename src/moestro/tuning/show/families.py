"""Decisions on disk, sorted into families: those of one environment, key and set of probes answer for each
other.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.errors import StoreWarning, TuningError
from moestro.tuning.lookup.table import Rounding, make_table
from moestro.tuning.show.explain import runner_text
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.store import Entry

__all__ = ["Family", "families", "parse_sizes"]


@dataclass(frozen=True)
class Family:
    """The decisions of one key, environment and set of probes, by bucket in ascending order."""

    environment: str
    key: StaticKey
    probes: tuple[str, ...]
    records: Mapping[Sizes, Record]

    @property
    def dynamic(self) -> int:
        """How many dynamic sizes there are."""
        return len(next(iter(self.records)))

    @property
    def title(self) -> str:
        """One line that tells it from other families."""
        runners = ", ".join(map(runner_text, self.key.runners))
        shapes = " ".join(filter(None, map(_shape, self.key.fields["inputs"])))
        probes = f", probes {', '.join(self.probes)}" if self.probes else ""
        return f"{self.key.op} of {runners} on {self.environment}{probes}\n  inputs {shapes}"

    def find(self, sizes: Sizes) -> tuple[Record, bool]:
        """The record for sizes, rounded up (a store does not know the maps of the operations), and whether they are
        within what was tuned. One that has decided nothing yet serves no call, and is given only where there is no
        other.
        """
        decided = {bucket: record for bucket, record in self.records.items() if record.is_decided}
        table = make_table(decided or self.records, (Rounding(None, direction=1),) * self.dynamic)
        assert table is not None
        return table.find(sizes)


def _shape(described: Mapping[str, Any]) -> str:
    if "shape" not in described:
        return str(described.get("value"))
    dims = ", ".join("N" if size is None else str(size) for size in described["shape"])
    return f"{str(described['dtype']).removeprefix('torch.')}[{dims}]"


def families(
    entries: Iterable[Entry], op: str = "*", environments: Iterable[str] = (), match: str = ""
) -> list[Family]:
    """The families of these decisions; op and environments are patterns, match is text in the key's JSON."""
    patterns = tuple(environments)
    found: dict[tuple[str, str, str, tuple[str, ...]], dict[Sizes, Record]] = {}
    keys: dict[str, StaticKey] = {}
    for entry in entries:
        if not fnmatch.fnmatchcase(entry.op, op) or match not in json.dumps(entry.key):
            continue
        if patterns and not any(fnmatch.fnmatchcase(entry.environment, p) for p in patterns):
            continue
        try:
            key, record = StaticKey.from_fields(entry.key), entry.record
        except Exception as error:
            warnings.warn(f"{entry.path} does not hold a decision ({error})", StoreWarning, stacklevel=2)
            continue
        keys[key.text] = key
        found.setdefault((entry.op, entry.environment, key.text, record.probes), {})[record.bucket] = record
    return [
        Family(environment, keys[text], probes, dict(sorted(records.items())))
        for (_, environment, text, probes), records in sorted(found.items())
    ]


def parse_sizes(text: str) -> Sizes:
    """ "64" or "64x128" as sizes. Raises TuningError for anything else."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise TuningError(f"a size must be a number, or several as 64x128, got {text!r}")
    return sizes

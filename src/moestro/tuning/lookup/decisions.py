"""All decisions of one static key, as a process knows them.

They are kept by the environment that they are valid in (which holds the policy), by the probes and by the
bucket, so that what was measured by one policy never counts as measured by another. What serves is, in this
order: this environment's own; those of the same question asked of other runners, where the winner is among
ours (FlashInfer's rule: a decision names its runner); another policy's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.store import Store

__all__ = ["DecisionsOfKey", "Listener"]

ByBucket = dict[Sizes, Record]
Probes = tuple[str, ...]  # their names
Table = dict[tuple[str, tuple[str, ...]], ByBucket]  # (environment, probes) -> bucket -> record
MISSED_KEPT = 4096


class Listener(Protocol):
    """Who is told that a decision has come."""

    def forget(self) -> None: ...


class DecisionsOfKey:
    """The book of one static key. Readers take no lock; `version` counts the changes.

    arity: how many sizes a bucket has. why_not(key, record): why a person's list of tactics keeps a record from
    serving, or None.
    """

    def __init__(
        self,
        key: StaticKey,
        arity: int = 1,
        why_not: Callable[[StaticKey, Record], str | None] = lambda key, record: None,
        device: str = "cpu",
    ) -> None:
        self.key = key
        self.device = device
        self.arity = arity
        self.version = 0
        self.private = False  # nothing is read from stores or written to them (exclude_from_cache)
        self.too_large: set[Sizes] = set()  # buckets that did not fit into this process's memory
        self.banned: dict[str, str] = {}  # candidate -> why it is in quarantine
        self.missed: set[Sizes] = set()  # labels of sizes beyond what was tuned that were warned of
        self.read: dict[str, Store | None] = {}  # stores that were read, by root
        self.shared: dict[str, int] = {}  # the version that a context's store was given
        self.environments: dict[str, Environment] = {}
        self.views: WeakSet[Listener] = WeakSet()  # to be told of changes
        self._why_not = why_not
        self._folders: dict[tuple[str, str], int] = {}  # (root, environment) -> folder's time of change
        self._records: Table = {}
        self._related: Table = {}
        self._lock = threading.Lock()

    # --- taking in -----------------------------------------------------------------------------------
    def add(self, records: Iterable[Record], environment: str) -> None:
        """Take records in. For one bucket a complete one replaces an incomplete one, else the newer the
        older.
        """
        with self._lock:
            changed = _merged(self._records, records, environment)
            if changed is not None:
                self._records = changed
                self._changed()

    def relate(self, other: DecisionsOfKey) -> None:
        """Take in what another runner list has decided for the same question, where its winners are ours."""
        if other is self or not other.decided:
            return
        for (environment, _), by_bucket in other._records.items():
            self.relate_records(other.key, by_bucket.values(), environment)

    def relate_records(
        self, key: StaticKey, records: Iterable[Record], environment: str, source: str | None = None
    ) -> None:
        """As relate, for records of another key, read from a store where `source` names one."""
        mine, theirs = self.key.participants(), key.participants()
        from_disk = source is not None  # objects without a value are told apart in one process only
        fitting = [
            replace(record, complete=False, source=source or record.source)
            for record in records
            if record.runner in mine
            and mine[record.runner][0] == theirs.get(record.runner, (object(), ()))[0]
            and (from_disk or mine[record.runner][1] == theirs[record.runner][1])
        ]
        with self._lock:
            changed = _merged(self._related, fitting, environment)
            if changed is not None:
                self._related = changed
                self._changed()

    def clear(self) -> None:
        """Forget everything that was decided or read."""
        with self._lock:
            self._records, self._related = {}, {}
            self.read.clear()
            self.shared.clear()
            self.missed.clear()
            self.banned.clear()
            self.too_large.clear()
            self._folders.clear()
            self._changed()

    def forked(self) -> None:
        """This process is a child: another thread may have held the lock when it was made."""
        self._lock = threading.Lock()

    def _changed(self) -> None:
        self.version += 1
        for view in list(self.views):
            view.forget()

    # --- asking --------------------------------------------------------------------------------------
    @property
    def decided(self) -> bool:
        """Whether anything is known of this key itself."""
        return bool(self._records)

    def knows(self, environment: str, probes: tuple[str, ...], bucket: Sizes) -> bool:
        """Whether there is a record for exactly this."""
        return bucket in self._records.get((environment, probes), {})

    def records(
        self, probes: Probes, environment: str, accepts: Sequence[Probes] = ()
    ) -> Mapping[Sizes, Record]:
        """What was measured with exactly these probes in this environment, by bucket; where there is none, what is
        complete of the probes that are accepted as well.
        """
        mine = self._records.get((environment, probes), {})
        others = [self._records.get((environment, names), {}) for names in reversed(accepts)]
        theirs = {b: record for by in others for b, record in by.items() if record.complete}
        return {**theirs, **mine} if theirs else mine

    def serving(
        self, probes: Probes, environment: str, accepts: Sequence[Probes] = ()
    ) -> Mapping[Sizes, Record]:
        """What serves calls with these probes: their own records and, where there is none, those of the probes that are
        accepted; else those of the probes tuned last.
        """
        for table, here in self._order(environment):
            found = {at: kept for at, by in table.items() if (at[0] == environment) is here
                     and (kept := self._allowed(by))}  # fmt: skip
            mine = [found.get((environment, names), {}) for names in (*reversed(accepts), probes)]
            if any(mine):
                return {bucket: record for by in mine for bucket, record in by.items()}
            if found:
                exact = {at: by for at, by in found.items() if at[1] == probes} or found
                return max(exact.values(), key=lambda by: max(r.created for r in by.values()))
        return {}

    def _order(self, environment: str) -> Iterator[tuple[Table, bool]]:
        yield self._records, True
        yield self._related, True
        yield self._records, False
        yield self._related, False

    def _allowed(self, by_bucket: ByBucket) -> ByBucket:
        return {
            b: record
            for b, record in by_bucket.items()
            if record.is_decided and self._why_not(self.key, record) is None
        }

    def others(self, environment: str) -> list[Record]:
        """Records of other environments and runner lists: worth trying first."""
        related = [r for by in self._related.values() for r in by.values()]
        other = [r for (env, _), by in self._records.items() if env != environment for r in by.values()]
        return [*other, *related]

    def everything(self) -> list[Record]:
        """All records, whatever their probes."""
        return [record for by_bucket in self._records.values() for record in by_bucket.values()]

    # --- folders that other processes may change -----------------------------------------------------
    def note_folder(self, store: Store, environment: Environment) -> None:
        """Remember when a folder was changed last; call before reading it."""
        self._folders[str(store.root), environment.name] = _time_of(store.folder(environment, self.key))

    def changed_folders(self) -> list[tuple[Store, Environment]]:
        """(store, environment) of each folder that has changed since it was read."""
        found = []
        for (root, name), noted in list(self._folders.items()):
            store, environment = self.read.get(root), self.environments.get(name)
            if store is None or environment is None:
                continue
            if _time_of(store.folder(environment, self.key)) != noted:
                found.append((store, environment))
        return found


def _merged(table: Table, records: Iterable[Record], environment: str) -> Table | None:
    """The table with records taken in; None if none of them changes it."""
    copied: Table = {}
    for record in records:
        at = (environment, record.probes)
        by_bucket = copied.get(at) or dict(table.get(at, {}))
        known = by_bucket.get(record.bucket)
        if known is None or (
            (record.complete, record.created) >= (known.complete, known.created) and record != known
        ):
            by_bucket[record.bucket] = record
            copied[at] = by_bucket
    return {**table, **copied} if copied else None


def _time_of(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return 0

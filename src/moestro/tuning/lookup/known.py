"""The decisions that a tuner knows, by static key, and the stores that they are read from and written to.

There is the tuner's own store and, inside a context with a `cache`, that one. Both are read when a key is
first seen; bundles that ship with the package fill what neither has. What is measured is written to the
innermost one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakSet

from moestro.tuning.contexts import Options
from moestro.tuning.lookup.table import label_of
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store import shipped
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.flashinfer import hints_for
from moestro.tuning.store.records import Record
from moestro.tuning.store.store import Store

__all__ = ["DecisionsOfKey", "KnownDecisions", "Listener"]

MEMORY = "memory"


class Listener(Protocol):
    """Who is told that a decision has come."""

    def forget(self) -> None: ...


class DecisionsOfKey:
    """All records of one static key, by probes and bucket. Readers take no lock; `version` counts the
    changes.
    """

    def __init__(self, key: StaticKey) -> None:
        self.key = key
        self.version = 0
        self.too_large: set[Sizes] = set()  # buckets that did not fit into this process's memory
        self.banned: dict[str, str] = {}  # candidate -> why it is in quarantine
        self.sources: dict[tuple[tuple[str, ...], Sizes], str] = {}
        self._records: dict[tuple[str, ...], dict[Sizes, Record]] = {}
        self.views: WeakSet[Listener] = WeakSet()  # to be told of changes
        self._lock = threading.Lock()

    def add(self, records: Iterable[Record], source: str = "memory") -> None:
        """Take records in. For one bucket a complete one replaces an incomplete one, else the newer the
        older.
        """
        with self._lock:
            changed = {probes: dict(by_bucket) for probes, by_bucket in self._records.items()}
            for record in records:
                by_bucket = changed.setdefault(record.probes, {})
                known = by_bucket.get(record.bucket)
                if known is None or (record.complete, record.created) >= (known.complete, known.created):
                    by_bucket[record.bucket] = record
                    self.sources[record.probes, record.bucket] = source
            self._records = changed
            self.version += 1
            for view in list(self.views):
                view.forget()

    def records(self, probes: tuple[str, ...]) -> Mapping[Sizes, Record]:
        """What was measured with exactly these probes, by bucket."""
        return self._records.get(probes, {})

    def serving(self, probes: tuple[str, ...]) -> Mapping[Sizes, Record]:
        """What serves a layer with these probes: their own records, else those of the probes tuned last."""
        known = self._records
        if known.get(probes) or not known:
            return known.get(probes, {})
        return max(known.values(), key=lambda found: max(r.created for r in found.values()))

    def everything(self) -> list[Record]:
        """All records, whatever their probes."""
        return [record for by_bucket in self._records.values() for record in by_bucket.values()]


class KnownDecisions:
    """One book for each static key and device."""

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self._books: dict[tuple[str, str], DecisionsOfKey] = {}
        self._read: set[tuple[str, str, str]] = set()
        self._shared: dict[tuple[str, str, str], int] = {}
        self._missed: set[tuple[str, Sizes]] = set()

    def book(self, key: StaticKey, device: str) -> DecisionsOfKey:
        """The book of a key on a device such as "cuda:0"."""
        return self._books.setdefault((key.text, device), DecisionsOfKey(key))

    def books(self) -> list[DecisionsOfKey]:
        """All books."""
        return list(self._books.values())

    def target(self, options: Options | None) -> Store | None:
        """Where decisions made under these options are written."""
        return options.store if options is not None and options.store is not None else self.store

    def open(
        self,
        book: DecisionsOfKey,
        device: str,
        options: Options | None,
        environment: Callable[[], Environment],
    ) -> None:
        """Read the stores in reach, and let a tuning context's own hold what is known."""
        own = options.store if options is not None else None
        for store in (self.store, own):
            mark = (str(store.root) if store is not None else MEMORY, book.key.text, device)
            if mark not in self._read:
                self._read.add(mark)
                self.refresh(book, store, environment())
        if own is not None and options is not None and options.tune:
            mark = (str(own.root), book.key.text, device)
            if self._shared.get(mark) != book.version:
                self._share(book, own, environment())
                self._shared[mark] = book.version

    def refresh(self, book: DecisionsOfKey, store: Store | None, environment: Environment) -> None:
        """Read what a store has for a book: other processes may have added to it."""
        if store is not None:
            book.add(store.load(environment, book.key), str(store.root))
            book.banned.update(store.banned(environment, book.key))
        known = {(record.probes, record.bucket) for record in book.everything()}
        for source, record in shipped.serving(book.key, environment):
            if (record.probes, record.bucket) not in known:
                book.add([record], source)

    def _share(self, book: DecisionsOfKey, store: Store, environment: Environment) -> None:
        """Write what is known of this environment: a cache holds what its context served."""
        there = {(record.probes, record.bucket) for record in store.load(environment, book.key)}
        for record in book.everything():
            if record.environment == environment.name and (record.probes, record.bucket) not in there:
                store.put(environment, book.key, record)

    def keep(
        self, book: DecisionsOfKey, store: Store | None, environment: Environment, record: Record
    ) -> None:
        """A decision has been made: on disk first, so that nothing is served that a crash would lose."""
        if not record.environment:
            record = replace(record, environment=environment.name)
        written = store is not None and store.put(environment, book.key, record)
        book.add([record], str(store.root) if store is not None and written else MEMORY)

    def ban(
        self, book: DecisionsOfKey, store: Store | None, environment: Environment, candidate: str, reason: str
    ) -> None:
        """A candidate must not be tried again in this environment."""
        book.banned[candidate] = reason
        if store is not None:
            store.ban(environment, book.key, candidate, reason)

    def warm(self, book: DecisionsOfKey, store: Store | None, environment: Environment) -> list[Record]:
        """Decisions made elsewhere, which are worth trying first."""
        found = shipped.hints(book.key)
        if store is not None:
            found = [*store.elsewhere(environment, book.key), *hints_for(store.root, book.key), *found]
        return found

    def miss(
        self,
        book: DecisionsOfKey,
        store: Store | None,
        sizes: Sizes,
        record: Record,
        environment: Callable[[], Environment],
    ) -> bool:
        """Note sizes beyond what was tuned; False if that was done before, for sizes up to the next powers of
        two.
        """
        label = label_of(sizes)
        if (book.key.text, label) in self._missed:
            return False
        self._missed.add((book.key.text, label))
        if store is not None:
            data: Mapping[str, Any] = {
                "sizes": list(sizes),
                "bucket": list(record.bucket),
                "created": time.time(),
            }
            store.log_miss(environment(), book.key, label, data)
        return True

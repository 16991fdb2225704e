"""The decisions that a tuner knows, by static key, and the stores that they are read from and written to.

In reach are the tuner's own store, the `cache` of every context that was entered (it stays loaded), and the
bundles that ship with the package, which fill what no store has. They are read when a key is first seen, and
again where `reload` or the watcher (watch.py) finds that a folder has changed. What is measured is written to
the innermost store. Keys whose calls never decide anything are forgotten, the oldest first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.tuning.contexts import Options
from moestro.tuning.lookup.decisions import DecisionsOfKey, Listener
from moestro.tuning.lookup.table import label_of
from moestro.tuning.lookup.watch import awake, watch
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.spec.runner import tactic_key
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.spec.tactic_list import TacticList, class_name
from moestro.tuning.store import shipped
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.flashinfer import hints_for
from moestro.tuning.store.store import Store

__all__ = ["DecisionsOfKey", "KnownDecisions", "Listener", "Statistics"]

EMPTY_KEPT = 256  # keys without a decision: one whose keyword differs in every call leaves no more than these
DECIDED_KEPT = 16384  # keys with decisions; the oldest are read again, or tuned again where there is no store
ATTACHED_KEPT = 16  # stores of contexts that were left
COUNTED = 4096  # entries of a collection of Statistics: what would grow without end is counted on, not listed


@dataclass
class Statistics:
    """What a process has tuned, by operation: FlashInfer's and TensorRT-LLM's AutoTunerStatistics.

    A call that found no decision counts once for its sizes, not each time.
    """

    cache_misses: int = 0
    cache_miss_config_collection: dict[str, set[Sizes]] = field(default_factory=dict)
    failed_profiling_count: dict[str, set[tuple[str, Sizes]]] = field(default_factory=dict)
    tuned_op_total_configs: dict[str, int] = field(default_factory=dict)  # buckets that were tried
    tuned_op_successful_configs: dict[str, int] = field(default_factory=dict)  # buckets with a decision
    tuned_op_time_cost: dict[str, float] = field(default_factory=dict)  # seconds
    failed_tactics: dict[str, set[Any]] = field(default_factory=dict)  # "op::Runner" -> tactics

    def missed(self, op: str, sizes: Sizes) -> None:
        """A call has found no decision."""
        known = self.cache_miss_config_collection.setdefault(op, set())
        if sizes not in known:
            self.cache_misses += 1
            if len(known) < COUNTED:
                known.add(sizes)

    def kept(self, key: StaticKey, record: Record) -> None:
        """A bucket has been decided. One that is only marked as covering larger sizes was counted before."""
        if record.tuned_for:
            return
        op = key.op
        self.tuned_op_total_configs[op] = self.tuned_op_total_configs.get(op, 0) + 1
        if any(c.samples for c in record.evidence.candidates):
            self.tuned_op_successful_configs[op] = self.tuned_op_successful_configs.get(op, 0) + 1
        self.tuned_op_time_cost[op] = self.tuned_op_time_cost.get(op, 0.0) + record.evidence.seconds
        for c in record.evidence.candidates:
            if c.fate in {"failed", "quarantined"}:
                failed = self.failed_profiling_count.setdefault(op, set())
                name = f"{class_name(c.runner)} {c.tactic!r}"
                if len(failed) < COUNTED:
                    failed.add((name, record.bucket))
                self.failed_tactics.setdefault(f"{op}::{class_name(c.runner)}", set()).add(
                    _hashable(c.tactic)
                )

    def __str__(self) -> str:
        lines = [f"Cache misses: {self.cache_misses}"]
        for op, sizes in sorted(self.cache_miss_config_collection.items()):
            lines.append(f"  {op}: sizes {', '.join(map(str, sorted(sizes)[:16]))}")
        for op, total in sorted(self.tuned_op_total_configs.items()):
            done = self.tuned_op_successful_configs.get(op, 0)
            seconds = self.tuned_op_time_cost.get(op, 0.0)
            lines.append(f"  {op}: {done} of {total} buckets measured in {seconds:.2f} s")
            lines += [
                f"    failed: {name} at {at}" for name, at in sorted(self.failed_profiling_count.get(op, ()))
            ]
        return "\n".join(lines)


def _hashable(tactic: Any) -> Any:
    if isinstance(tactic, list | tuple):
        return tuple(map(_hashable, tactic))
    try:
        hash(tactic)
    except TypeError:
        return digest(tactic_key(tactic, None))
    return tactic


class KnownDecisions:
    """One book for each static key and device."""

    def __init__(self, store: Store | None, tactics: TacticList | None = None) -> None:
        self.store = store
        self.tactics = tactics or TacticList()
        self.stats = Statistics()
        self.attached: list[Store] = []
        self.busy = 0  # measurements under way: nothing is read in the background meanwhile
        self._books: dict[tuple[StaticKey, str], DecisionsOfKey] = {}
        self._families: dict[tuple[str, str], dict[tuple[StaticKey, str], DecisionsOfKey]] = {}
        self._room = EMPTY_KEPT
        self._lock = threading.Lock()
        watch(self)

    # --- books ---------------------------------------------------------------------------------------
    def book(self, key: StaticKey, device: str, arity: int = 1) -> DecisionsOfKey:
        """The book of a key on a device such as "cuda:0". arity: how many dynamic sizes its buckets have."""
        found = self._books.get((key, device))
        if found is None:
            with self._lock:
                found = self._books.get((key, device))
                if found is None:
                    found = DecisionsOfKey(key, arity, self.tactics.why_not, device)
                    self._forget_oldest()
                    family = self._family(found, device)
                    for other in family.values():
                        found.relate(other)
                    self._books[key, device] = family[key, device] = found
        return found

    def books(self) -> list[DecisionsOfKey]:
        """All books."""
        return list(self._books.values())

    def clear(self) -> None:
        """Forget everything: what stores hold is read again when it is next asked for."""
        with self._lock:
            for book in self._books.values():
                book.clear()

    def _forget_oldest(self) -> None:
        """Make room: half of the keys that nothing is known of, once there are too many."""
        if len(self._books) < self._room:
            return
        empty = [at for at, book in self._books.items() if not book.decided]
        decided = len(self._books) - len(empty)
        gone = empty[: len(empty) - EMPTY_KEPT // 2] if len(empty) >= EMPTY_KEPT else []
        if decided >= DECIDED_KEPT:
            gone += [at for at, book in self._books.items() if book.decided][: DECIDED_KEPT // 2]
        for at in gone:
            book = self._books.pop(at)
            family = self._family(book, book.device)
            family.pop(at, None)
            if not family:
                del self._families[book.key.family, book.device]
        self._room = len(self._books) + EMPTY_KEPT // 2

    def _family(self, book: DecisionsOfKey, device: str) -> dict[tuple[StaticKey, str], DecisionsOfKey]:
        """The books of one question, which differ in who takes part."""
        return self._families.setdefault((book.key.family, device), {})

    def _tell_family(self, book: DecisionsOfKey, device: str) -> None:
        """Who takes part may differ, not the question: its decisions serve where their winners take part too."""
        for other in list(self._family(book, device).values()):
            other.relate(book)

    def forked(self) -> None:
        """This process is a child: other threads may have held locks when it was made."""
        self._lock = threading.Lock()
        self.busy = 0
        for book in self.books():
            book.forked()

    # --- stores --------------------------------------------------------------------------------------
    def attach(self, store: Store) -> None:
        """Keep a context's store in reach after the context is left."""
        if all(store.root != known.root for known in self.attached) and (
            self.store is None or store.root != self.store.root
        ):
            self.attached = [*self.attached[-ATTACHED_KEPT + 1 :], store]

    def target(self, options: Options | None) -> Store | None:
        """Where decisions made under these options are written."""
        return options.store if options is not None and options.store is not None else self.store

    def open(
        self,
        book: DecisionsOfKey,
        options: Options | None,
        environment: Callable[[], Environment],
    ) -> None:
        """Read the stores in reach that were not read yet, and let a tuning context's own hold what is known."""
        own = options.store if options is not None else None
        for store in (self.store, *self.attached, own):
            mark = str(store.root) if store is not None else ""
            if mark not in book.read:
                book.read[mark] = store
                self.refresh(book, store, environment())
        if own is not None and options is not None and options.tune and not book.private:
            mark = str(own.root)
            if book.shared.get(mark) != book.version:
                self._share(book, own, environment())
                book.shared[mark] = book.version

    def refresh(self, book: DecisionsOfKey, store: Store | None, environment: Environment) -> None:
        """Read what a store has for a book: other processes may have added to it."""
        book.environments[environment.name] = environment
        if store is not None and not book.private:
            awake()
            book.note_folder(store, environment)
            records = store.load(environment, book.key, book.arity)
            book.add([replace(r, source=str(store.root)) for r in records], environment.name)
            book.banned.update(store.banned(environment, book.key))
            if not records:
                for key, others in store.relatives(environment, book.key, book.arity):
                    book.relate_records(key, others, environment.name, str(store.root))
        found = []
        for source, record in shipped.serving(book.key, environment, book.arity):
            if not book.knows(environment.name, record.probes, record.bucket):
                found.append(replace(record, source=source))
        book.add(found, environment.name)
        self._tell_family(book, book.device)

    def reload(self) -> int:
        """Read every store again that books were read from; how many decisions came or changed."""
        before = {id(book): book.everything() for book in self.books()}
        for book in self.books():
            for store in list(book.read.values()):
                for environment in list(book.environments.values()):
                    self.refresh(book, store, environment)
        return sum(
            record not in before.get(id(book), []) for book in self.books() for record in book.everything()
        )

    def look_for_changes(self) -> None:
        """Read again what has changed on disk since it was read (called in the background)."""
        for book in self.books():
            for store, environment in book.changed_folders():
                self.refresh(book, store, environment)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """While this lasts, nothing is read in the background: it would disturb the clock."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    def _share(self, book: DecisionsOfKey, store: Store, environment: Environment) -> None:
        """Write what is known of this environment: a cache holds what its context served."""
        there = {(r.probes, r.bucket) for r in store.load(environment, book.key, book.arity)}
        for record in book.everything():
            if record.environment == environment.name and (record.probes, record.bucket) not in there:
                store.put(environment, book.key, record)

    # --- what is learned -----------------------------------------------------------------------------
    def keep(
        self, book: DecisionsOfKey, store: Store | None, environment: Environment, record: Record
    ) -> None:
        """A decision has been made: on disk first, so that nothing is served that a crash would lose."""
        if not record.environment:
            record = replace(record, environment=environment.name)
        written = store is not None and not book.private and store.put(environment, book.key, record)
        source = str(store.root) if store is not None and written else "memory"
        book.environments[environment.name] = environment
        self.stats.kept(book.key, record)
        book.add([replace(record, source=source)], environment.name)
        self._tell_family(book, book.device)

    def ban(
        self, book: DecisionsOfKey, store: Store | None, environment: Environment, candidate: str, reason: str
    ) -> None:
        """A candidate must not be tried again in this environment."""
        book.banned[candidate] = reason
        if store is not None and not book.private:
            store.ban(environment, book.key, candidate, reason)

    def warm(self, book: DecisionsOfKey, store: Store | None, environment: Environment) -> list[Record]:
        """Decisions made elsewhere, which are worth trying first."""
        found = [*book.others(environment.name), *shipped.hints(book.key, book.arity)]
        if store is not None and not book.private:
            found = [
                *store.elsewhere(environment, book.key, book.arity),
                *hints_for(store.root, book.key),
                *found,
            ]
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
        if label in book.missed:
            return False
        book.missed.add(label)
        if store is not None and not book.private:
            data: Mapping[str, Any] = {
                "sizes": list(sizes),
                "bucket": list(record.bucket),
                "created": time.time(),
            }
            store.log_miss(environment(), book.key, label, data)
        return True

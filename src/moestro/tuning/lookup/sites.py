"""From inputs to a decision without measuring: call sites and their views of the decisions.

A CallSite is one op with its runners and configuration, as a caller gives them; it is found again by the identity
of these objects and forgotten when one of them dies. A Lookup is a site's look-up table for one static key. Its
book tells it when a decision has come; it then makes its table anew. Nothing here takes a lock.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.tuning.contexts import Options
from moestro.tuning.lookup.guards import Guard, make_guard
from moestro.tuning.lookup.known import DecisionsOfKey
from moestro.tuning.lookup.table import IntervalTable, PointTable, Table, make_table, roundings
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.spec.specs import Sizes, TuningConfig
from moestro.tuning.store.records import Record

__all__ = ["CallSite", "CallSites", "Lookup"]

SITES_KEPT = 4096
VIEWS_KEPT = 64  # static keys of one site: a layer is called with one, or a few
GUARDS_KEPT = 8
DONE_KEPT = 4096

Pick = tuple[int, Any]  # (index of the runner, tactic)
DEFAULT_PICK: Pick = (0, DEFAULT_TACTIC)


class Lookup:
    """A site's look-ups in one book.

    With one dynamic size (the first input's that has it) or none, `quick` answers from two lists: sizes up to
    bounds[i] get picks[i]. They are one tuple, so that a reader never sees the one with another's other.
    """

    __slots__ = (
        "__weakref__",
        "_fast",
        "_points",
        "_rounds",
        "_table",
        "_version",
        "book",
        "dims",
        "done",
        "probes",
    )

    def __init__(self, book: DecisionsOfKey, site: CallSite) -> None:
        specs = site.config.dynamic_tensor_specs
        self.book = book
        self.probes = tuple(probe.name for probe in site.config.probes)
        self.done: set[Sizes] = set()  # sizes that tuning has nothing left to do for
        self.dims = [(spec.input_idx[0], spec.dim_idx[0]) for spec in specs]
        self._rounds = roundings(site.config, site.direction)
        self._table: Table | None = None
        self._version = -1
        self._fast: tuple[list[float], list[Pick]] | None = None
        self._points: PointTable | None = None
        book.views.add(self)

    def quick(self, inputs: Sequence[Any]) -> Pick | None:
        """The pick by the dynamic sizes alone; None if `find` must be asked."""
        fast = self._fast
        if fast is None:
            return self._quick_point(inputs)
        bounds, picks = fast
        if bounds[0] == math.inf:
            return picks[0]
        tensor, dim = self.dims[0]
        at = bisect_left(bounds, inputs[tensor].shape[dim])
        return picks[at] if at < len(picks) else None

    def _quick_point(self, inputs: Sequence[Any]) -> Pick | None:
        points = self._points
        if points is None:
            return None
        record, within = points.find(tuple([inputs[tensor].shape[dim] for tensor, dim in self.dims]))
        return self.pick(record) if within else None

    @property
    def fast(self) -> tuple[list[float], list[Pick]] | None:
        """(bounds, picks) as they are now; None if `find` must be asked first."""
        return self._fast

    def find(self, sizes: Sizes) -> tuple[Record | None, bool]:
        """The record that answers for these sizes, and whether they are within what was tuned."""
        if self._version != self.book.version:
            version = self.book.version
            self._table = make_table(self.book.serving(self.probes), self._rounds)
            self._version = version
            self._publish()
        return self._table.find(sizes) if self._table is not None else (None, False)

    def pick(self, record: Record | None) -> Pick:
        """The pick that a record stands for; the default without one."""
        if record is None:
            return DEFAULT_PICK
        return self.book.key.runners.index(record.runner), record.tactic

    def accept(self, sizes: Sizes) -> None:
        """Answer for sizes beyond what was tuned without asking again."""
        if isinstance(self._table, IntervalTable):
            self._table.extend(sizes[0])
            self._publish()

    def finished(self, sizes: Sizes) -> None:
        """Remember that nothing is left to tune for these sizes."""
        if len(self.done) >= DONE_KEPT:
            self.done.clear()
        self.done.add(sizes)

    def forget(self) -> None:
        """The book has changed: nothing is served fast before `find` has been asked again."""
        self._fast = self._points = None

    def _publish(self) -> None:
        table = self._table
        if table is None:
            self._fast = ([math.inf], [DEFAULT_PICK])
        elif isinstance(table, IntervalTable):
            self._fast = (list(table.bounds), [self.pick(record) for record in table.records])
        elif not self._rounds:
            self._fast = ([math.inf], [self.pick(table.find(())[0])])
        elif isinstance(table, PointTable):
            self._points = table
        if self._version != self.book.version:
            self._fast = self._points = None  # a decision came meanwhile, and its forget() before this


class CallSite:
    """One op with its runners and configuration, with what an autotune context changes applied."""

    def __init__(self, op: str, config: TuningConfig, options: Options | None) -> None:
        self.op = op
        self.config = options.apply(config) if options is not None else config
        self.direction = options.direction if options is not None else 0
        self.views: dict[tuple[str, str], Lookup] = {}
        self.guards: tuple[tuple[Guard, Lookup], ...] = ()
        self.refs: list[Any] = []

    def view(self, key: StaticKey, device: str, book: Callable[[], DecisionsOfKey]) -> Lookup:
        """The view for a static key on a device."""
        found = self.views.get((key.text, device))
        if found is None:
            if len(self.views) >= VIEWS_KEPT:
                self.views.clear()
            found = self.views[key.text, device] = Lookup(book(), self)
        return found

    def guarded(
        self, runners: Sequence[Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Lookup | None:
        """The view of an earlier call that had the same key, if it can be told quickly."""
        for guard, view in self.guards:
            if guard(runners, inputs, kwargs):
                return view
        return None

    def guard(
        self, view: Lookup, runners: Sequence[Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Remember what calls of this view look like."""
        guard = make_guard(runners, self.config, inputs, kwargs)
        if guard is not None:
            self.guards = (*self.guards[-GUARDS_KEPT + 1 :], (guard, view))


class CallSites:
    """The call sites of a tuner, by identity; an entry goes when its configuration or one of its runners
    dies.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], CallSite] = {}

    def get(self, op: str, runners: Sequence[Any], config: TuningConfig, options: Options | None) -> CallSite:
        """The site for these objects, under these options."""
        changes = () if options is None else (options.buckets, options.direction, options.probes)
        key = (op, id(config), *map(id, runners), *changes)
        site = self.known.get(key)
        if site is None:
            if len(self.known) >= SITES_KEPT:
                self.known.clear()
            site = CallSite(op, config, options)
            site.refs = [_watch(thing, self.known, key) for thing in (config, *runners)]
            self.known[key] = site
        return site


def _watch(thing: Any, known: dict[tuple[Any, ...], CallSite], key: tuple[Any, ...]) -> Any:
    """A weak reference that takes the entry out when the thing dies, or the thing where it takes none."""
    try:
        return weakref.ref(thing, lambda _: known.pop(key, None))
    except TypeError:
        return thing

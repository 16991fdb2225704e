"""From inputs to a decision without measuring: call sites and their views of the decisions.

A CallSite is one op with its runners and configuration, as a caller gives them. It is found again by the identity
of these objects, else by what they are made of (signature.py): runners, classes and configurations that are made
anew in every call share one. A Lookup is a site's look-up table for one static key. Its book tells it when a
decision has come; it then makes its table anew. Nothing here takes a lock.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.tuning.contexts import Options
from moestro.tuning.lookup.decisions import DecisionsOfKey
from moestro.tuning.lookup.guards import Guard, make_guard
from moestro.tuning.lookup.signature import signature_of
from moestro.tuning.lookup.table import IntervalTable, PointTable, Table, make_table, roundings
from moestro.tuning.lookup.validity import DEFAULT_PICK, Pick, Validity
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.spec.specs import Sizes, TuningConfig
from moestro.tuning.store.environment import Environment

__all__ = ["CallSite", "CallSites", "Lookup"]

SITES_KEPT = 4096  # by identity
SIGNATURES_KEPT = 1024  # by what they are made of
VIEWS_KEPT = 64  # static keys of one site: a layer is called with one, or a few
GUARDS_KEPT = 8
DONE_KEPT = 4096


class Lookup:
    """A site's look-ups in one book.

    With one dynamic size (the first input's that has it) or none, `quick` answers from two lists: sizes up to
    bounds[i] get picks[i], or where that is None what `by_size` has. They are one tuple, so that a reader never
    sees the one with another's other.
    """

    __slots__ = (
        "__weakref__",
        "_capped",
        "_points",
        "_rounds",
        "_table",
        "_version",
        "_where",
        "accepts",
        "book",
        "dims",
        "done",
        "environment",
        "fast",
        "probes",
        "validity",
    )

    def __init__(self, book: DecisionsOfKey, site: CallSite, environment: str) -> None:
        specs = site.config.dynamic_tensor_specs
        self.book = book
        self.environment = environment  # where calls of this site are measured
        self.probes = tuple(probe.name for probe in site.config.probes)
        self.accepts = site.config.accepts
        self.done: set[Sizes] = set()  # sizes that tuning has nothing left to do for
        self.dims = [(spec.input_idx[0], spec.dim_idx[0]) for spec in specs]
        self._where = self.dims[0] if self.dims else None
        self._capped = site.config.tune_max_num_tokens is not None  # larger sizes count as the last one
        self._rounds = roundings(site.config, site.direction)
        self._table: Table | None = None
        self._version = -1
        self.fast: tuple[list[float], list[Pick | None]] | None = None
        self.validity = Validity(book.key)
        self._points: PointTable | None = None
        book.views.add(self)

    def quick(self, inputs: Sequence[Any]) -> Pick | None:
        """The pick by the dynamic sizes alone; None if `find` must be asked."""
        fast = self.fast
        if fast is None:
            return self._quick_point(inputs)
        bounds, picks = fast
        where = self._where
        if where is None:
            return picks[0]
        size = inputs[where[0]].shape[where[1]]
        at = bisect_left(bounds, size)
        if at >= len(picks):
            return None
        pick = picks[at]
        return self.validity.by_size.get(size) if pick is None else pick

    def _quick_point(self, inputs: Sequence[Any]) -> Pick | None:
        points = self._points
        if points is None:
            return None
        sizes = tuple([inputs[tensor].shape[dim] for tensor, dim in self.dims])
        pick = self.validity.by_size.get(sizes)
        if pick is not None:
            return pick
        record, within = points.find(sizes)
        pick = self.validity.pick_of(record)
        return pick if within and pick[1] == DEFAULT_TACTIC else None

    def find(self, sizes: Sizes) -> tuple[Record | None, bool]:
        """The record that answers for these sizes, and whether they are within what was tuned."""
        if self._version != self.book.version:
            version = self.book.version
            records = self.book.serving(self.probes, self.environment, self.accepts)
            self._table = make_table(records, self._rounds)
            self._version = version
            self.validity.clear()
            self._publish()
        return self._table.find(sizes) if self._table is not None else (None, False)

    def pick(
        self,
        record: Record | None,
        config: TuningConfig,
        runners: Sequence[Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        sizes: Sizes,
    ) -> Pick:
        """What serves these inputs by a record: its own pick where that is valid."""
        validity = self.validity
        if record is None or self._version != self.book.version:
            return validity.pick_of(record)
        known = validity.by_size.get(sizes[0] if len(sizes) == 1 else sizes)
        low, high = validity.range_of(record)
        if known is not None or (len(sizes) == 1 and low <= sizes[0] <= high):
            return known or validity.pick_of(record)
        chosen = validity.ask(record, config, runners, inputs, kwargs, sizes, self._alike(record))
        self._publish()
        return chosen

    def _alike(self, record: Record) -> list[tuple[Sizes, int, int]]:
        """(bucket, first, last size) of the intervals that this record's pick serves, with one dynamic size."""
        table, before, found = self._table, 0, []
        if isinstance(table, IntervalTable):
            pick = self.validity.pick_of(record)
            for bound, other in zip(table.bounds, table.records, strict=True):
                if self.validity.pick_of(other) == pick:
                    found.append((other.bucket, before + 1, bound))
                before = bound
        return found

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
        self.fast = self._points = None

    def _publish(self) -> None:
        table, validity = self._table, self.validity
        if table is None:
            self.fast = ([math.inf], [DEFAULT_PICK])
        elif isinstance(table, IntervalTable):
            self.fast = self._intervals(table)
        elif not self._rounds:
            record = table.find(())[0]
            pick = validity.pick_of(record)
            self.fast = ([math.inf], [pick if pick[1] == DEFAULT_TACTIC else validity.by_size.get(())])
        elif isinstance(table, PointTable):
            self._points = table
        if self._version != self.book.version:
            self.fast = self._points = None  # a decision came meanwhile, and its forget() before this

    def _intervals(self, table: IntervalTable) -> tuple[list[float], list[Pick | None]]:
        """(bounds, picks): a record's pick where it is known to be valid, None where that must be asked."""
        bounds: list[float] = []
        picks: list[Pick | None] = []
        before = 0
        for bound, record in zip(table.bounds, table.records, strict=True):
            pick = self.validity.pick_of(record)
            low, high = (before + 1, bound) if pick[1] == DEFAULT_TACTIC else self.validity.range_of(record)
            low, high = max(low, before + 1), min(high, bound)
            if low > high:
                low, high = bound + 1, bound
            for end, here in ((low - 1, None), (high, pick), (bound, None)):
                if end > before:
                    bounds.append(end)
                    picks.append(here)
                    before = end
        if self._capped:
            bounds[-1] = math.inf
        return bounds, picks


class CallSite:
    """One op with its runners and configuration, with what an autotune context changes applied."""

    def __init__(self, op: str, config: TuningConfig, options: Options | None) -> None:
        self.op = op
        self.config = options.apply(config) if options is not None else config
        self.direction = options.direction if options is not None else 0
        self.views: dict[tuple[StaticKey, str], Lookup] = {}
        self.guards: tuple[tuple[Guard, Lookup], ...] = ()
        self.environments: dict[str, Environment] = {}  # by device

    def view(
        self, key: StaticKey, device: str, environment: str, book: Callable[[], DecisionsOfKey]
    ) -> Lookup:
        """The view for a static key on a device. environment: the name of where it is measured."""
        found = self.views.get((key, device))
        if found is None:
            if len(self.views) >= VIEWS_KEPT:
                self.views.clear()
                self.guards = ()
            found = self.views[key, device] = Lookup(book(), self, environment)
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
    """The call sites of a tuner: `known` by the identity of runners and configuration, whose entries go when one
    of them dies, and all of them by signature.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], CallSite] = {}
        self._refs: dict[tuple[Any, ...], list[Any]] = {}
        self._by_signature: dict[Any, CallSite] = {}

    def get(self, op: str, runners: Sequence[Any], config: TuningConfig, options: Options | None) -> CallSite:
        """The site for these objects, under these options."""
        changes = () if options is None else options.changes
        key = (op, id(config), *map(id, runners), *changes)
        site = self.known.get(key)
        if site is None:
            site = self._of_signature(op, runners, config, options, changes)
            self._remember(key, site, (config, *runners))
        return site

    def clear(self) -> None:
        """Forget every site."""
        self.known.clear()
        self._refs.clear()
        self._by_signature.clear()

    def _of_signature(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        options: Options | None,
        changes: tuple[Any, ...],
    ) -> CallSite:
        signature = (op, signature_of(runners, config), changes)
        site = self._by_signature.get(signature)
        if site is None:
            if len(self._by_signature) >= SIGNATURES_KEPT:
                self._by_signature.pop(next(iter(self._by_signature)))
            site = self._by_signature[signature] = CallSite(op, config, options)
        return site

    def _remember(self, key: tuple[Any, ...], site: CallSite, things: Sequence[Any]) -> None:
        """Find the site by these objects from now on, if one can be told when they die."""

        def gone(_: Any) -> None:
            self.known.pop(key, None)
            self._refs.pop(key, None)

        try:
            refs = [weakref.ref(thing, gone) for thing in things]
        except TypeError:
            return  # one that takes no weak reference: by signature each time
        if len(self.known) >= SITES_KEPT:
            self.known.clear()
            self._refs.clear()
        self._refs[key] = refs
        self.known[key] = site

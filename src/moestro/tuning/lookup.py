"""From inputs to a decision without measuring: call sites and their views of the decisions.

A Site is one op with its runners and configuration, as a caller gives them; it is found again by the identity
of these objects and forgotten when one of them dies. A View is a site's look-up table for one static key,
made anew when its book has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from moestro.tuning.book import Book, IntervalTable, Table, make_table, roundings
from moestro.tuning.buckets import next_positive_power_of_2
from moestro.tuning.context import Options
from moestro.tuning.decisions import Record
from moestro.tuning.runner import DEFAULT_TACTIC
from moestro.tuning.specs import Sizes, TuningConfig

__all__ = ["Site", "Sites", "View"]

SITES_KEPT = 4096
VIEWS_KEPT = 64  # static keys of one site: layers are called with one, or a few
DONE_KEPT = 4096


class View:
    """A site's look-ups in one book."""

    def __init__(self, book: Book, site: Site) -> None:
        self.book = book
        self.probes = tuple(probe.name for probe in site.config.probes)
        self.done: set[Sizes] = set()  # sizes that tuning has nothing left to do for
        self._rounds = roundings(site.config, site.direction)
        self._table: Table | None = None
        self._version = -1

    @property
    def table(self) -> Table | None:
        """The table for the records as they are now; None without any."""
        if self._version != self.book.version:
            self._version = self.book.version
            self._table = make_table(self.book.serving(self.probes), self._rounds)
        return self._table

    def find(self, sizes: Sizes) -> tuple[Record | None, bool]:
        """The record that answers for these sizes, and whether they are within what was tuned."""
        table = self.table
        return table.find(sizes) if table is not None else (None, False)

    def choice(self, record: Record | None) -> tuple[int, Any]:
        """(index of the runner, tactic) of a record; the default without one."""
        if record is None:
            return 0, DEFAULT_TACTIC
        return self.book.key.runners.index(record.runner), record.tactic

    def accept(self, sizes: Sizes) -> None:
        """Answer for sizes beyond what was tuned without asking again."""
        if isinstance(self._table, IntervalTable):
            self._table.extend(sizes[0])

    def finished(self, sizes: Sizes) -> None:
        """Remember that nothing is left to tune for these sizes."""
        if len(self.done) >= DONE_KEPT:
            self.done.clear()
        self.done.add(sizes)


class Site:
    """One op with its runners and configuration, with what an autotune context changes applied."""

    def __init__(self, op: str, config: TuningConfig, options: Options | None) -> None:
        self.op = op
        self.config = options.apply(config) if options is not None else config
        self.direction = options.direction if options is not None else 0
        self.views: dict[tuple[str, str], View] = {}
        self.refs: list[Any] = []

    def view(self, key: tuple[str, str], book: Callable[[], Book]) -> View:
        """The view for a (static key, device)."""
        found = self.views.get(key)
        if found is None:
            if len(self.views) >= VIEWS_KEPT:
                self.views.clear()
            found = self.views[key] = View(book(), self)
        return found


class Sites:
    """The call sites of a tuner, by identity; an entry goes when its configuration or one of its runners
    dies.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Site] = {}

    def get(self, op: str, runners: Sequence[Any], config: TuningConfig, options: Options | None) -> Site:
        """The site for these objects, under these options."""
        changes = None if options is None else (options.buckets, options.direction, options.probes)
        key = (op, id(config), *map(id, runners), changes)
        site = self._known.get(key)
        if site is None:
            if len(self._known) >= SITES_KEPT:
                self._known.clear()
            site = Site(op, config, options)
            site.refs = [_watch(thing, self._known, key) for thing in (config, *runners)]
            self._known[key] = site
        return site


def _watch(thing: Any, known: dict[tuple[Any, ...], Site], key: tuple[Any, ...]) -> Any:
    """A weak reference that takes the entry out when the thing dies, or the thing where it takes none."""
    try:
        return weakref.ref(thing, lambda _: known.pop(key, None))
    except TypeError:
        return thing


def label_of(sizes: Sizes) -> Sizes:
    """What sizes beyond the tuned range are counted under: the next powers of two."""
    return tuple(next_positive_power_of_2(size) for size in sizes)

"""Tuning one static key: which buckets, in which order, and where between two buckets the winner changes.

Order: the bucket of the call that is waiting, the largest (so that everything below is covered), then always
the one in the middle of the widest gap: whenever the budget ends, what is known is spread over the sizes.
Then the crossover search: between neighbours with different winners the middle is measured, among those two
and the default only, until the boundary is known to RESOLUTION of the size. Between neighbours with the same
winner nothing is measured.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from moestro.errors import TuningWarning
from moestro.tuning.decisions import Record
from moestro.tuning.measure import Job, OutOfMemoryError, measure, record_name
from moestro.tuning.specs import Sizes

__all__ = ["tune"]

RESOLUTION = 32  # a boundary is searched to 1/32 of the size: 3 %, where both winners are nearly equal


def tune(
    job: Job,
    known: Callable[[], Mapping[Sizes, Record]],
    keep: Callable[[Record], None],
    first: Sizes,
    *,
    crossover: bool = True,
) -> bool:
    """Decide every bucket up to job.sizes that is not known; True if nothing is left to do.

    known: the records so far, which others may add to. keep: called with each record at once. first: the
    bucket that the waiting call needs.
    """
    grid = job.config.bucket_grid(job.sizes)
    too_large: set[Sizes] = set()
    job.budget.start()
    try:
        _decide(job, known, keep, grid, first, too_large)
        if crossover and len(job.sizes) == 1 and job.budget.left > 0:
            _search_crossovers(job, known, keep, too_large)
        done = all(_settled(known().get(bucket)) or bucket in too_large for bucket in grid)
        if done:
            _mark_covered(job, known, keep)
        return done
    finally:
        job.budget.stop()


def _settled(record: Record | None) -> bool:
    return record is not None and record.complete


def _decide(
    job: Job,
    known: Callable[[], Mapping[Sizes, Record]],
    keep: Callable[[Record], None],
    grid: list[Sizes],
    first: Sizes,
    too_large: set[Sizes],
) -> None:
    open_ = [b for b in _ordered(grid, first) if not _settled(known().get(b))]
    open_.sort(key=lambda b: b in known())  # what has no decision at all comes first
    for done, bucket in enumerate(open_):
        if job.budget.left <= 0:
            return
        if _settled(known().get(bucket)):
            continue  # another process has decided it meanwhile
        share = job.budget.left / (len(open_) - done)
        job.progress(f"{job.key.op} {done + 1}/{len(open_)}: bucket {_text(bucket)}")
        _attempt(job, bucket, known, keep, too_large, deadline=job.budget.spent + share)


def _attempt(
    job: Job,
    bucket: Sizes,
    known: Callable[[], Mapping[Sizes, Record]],
    keep: Callable[[Record], None],
    too_large: set[Sizes],
    *,
    only: Sequence[Record] | None = None,
    deadline: float = float("inf"),
) -> Record | None:
    try:
        record = measure(job, bucket, preferred=_neighbour(bucket, known()), only=only, deadline=deadline)
    except OutOfMemoryError as error:
        too_large.add(bucket)
        warnings.warn(
            f"{job.key.op}: bucket {_text(bucket)} does not fit into memory and is left out: {error}",
            TuningWarning,
            stacklevel=2,
        )
        return None
    if record is not None:
        keep(replace(record, learned=only is not None))
    return record


def _search_crossovers(
    job: Job,
    known: Callable[[], Mapping[Sizes, Record]],
    keep: Callable[[Record], None],
    too_large: set[Sizes],
) -> None:
    records = sorted(known().items())
    for (low, at_low), (high, at_high) in itertools.pairwise(records):
        for _ in _bisect(low[0], at_low, high[0], at_high, job, known, keep, too_large):
            if job.budget.left <= 0:
                return


def _bisect(
    low: int,
    at_low: Record,
    high: int,
    at_high: Record,
    job: Job,
    known: Callable[[], Mapping[Sizes, Record]],
    keep: Callable[[Record], None],
    too_large: set[Sizes],
) -> Iterator[Record]:
    """Measure the middle of (low, high) and go on where the winners still differ."""
    if record_name(at_low) == record_name(at_high) or high - low <= max(1, high // RESOLUTION):
        return
    middle = (low + high) // 2
    job.progress(f"{job.key.op}: the winner changes between {low} and {high}, trying {middle}")
    found = _attempt(job, (middle,), known, keep, too_large, only=(at_low, at_high))
    if found is None:
        return
    yield found
    yield from _bisect(low, at_low, middle, found, job, known, keep, too_large)
    yield from _bisect(middle, found, high, at_high, job, known, keep, too_large)


def _mark_covered(
    job: Job, known: Callable[[], Mapping[Sizes, Record]], keep: Callable[[Record], None]
) -> None:
    """Note on the largest bucket that sizes up to job.sizes were tuned for, where it lies below them."""
    records = known()
    if not job.sizes or not records:
        return
    largest = records[max(records)]
    reach = tuple(map(max, zip(largest.tuned_for or largest.bucket, job.sizes, strict=True)))
    if reach != (largest.tuned_for or largest.bucket):
        keep(replace(largest, tuned_for=reach))


def _neighbour(bucket: Sizes, known: Mapping[Sizes, Record]) -> Record | None:
    """The record of the nearest bucket, which wins ties here."""
    others = [b for b in known if b != bucket and known[b].status == "measured"]
    if not others:
        return None
    nearest = min(others, key=lambda b: (sum(abs(x - y) for x, y in zip(b, bucket, strict=True)), b))
    return known[nearest]


def _ordered(grid: Sequence[Sizes], first: Sizes) -> list[Sizes]:
    """The grid with `first`, then the largest, then the smallest, then middles of ever smaller gaps."""
    ordered = sorted(grid)
    order = [b for b in (first,) if b in ordered] + [ordered[-1], ordered[0]]
    gaps = [(0, len(ordered) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(ordered[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _text(bucket: Sizes) -> str:
    return " x ".join(map(str, bucket)) or "only"

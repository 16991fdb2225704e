"""Tuning one static key: which buckets, in which order, and where between two buckets the winner changes.

Order: the bucket of the call that is waiting, the largest (so that everything below is covered), then always
the middle of the widest gap: whenever the budget ends, what is known is spread over the sizes. Then the
crossover search: between neighbours with different winners the middle is measured, among those two and the
default only, until the boundary is known to 1/RESOLUTION of the size. Between neighbours with the same winner
nothing is measured.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moestro.errors import TuningWarning
from moestro.tuning.measure.candidates import Trial, resolved_default
from moestro.tuning.measure.compile import precompile_for
from moestro.tuning.measure.decide import measure
from moestro.tuning.measure.request import Job, OutOfMemoryError, record_name
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.inputs import inputs_like
from moestro.tuning.spec.keys import shapes_of
from moestro.tuning.spec.specs import Sizes

__all__ = ["Campaign", "spread"]

Bucket = TypeVar("Bucket", int, Sizes)
# Of the budget, for compiling all sizes' kernels before the first is measured: of 60 s, half was not enough for 107
# kernels in a process that had compiled nothing before (H100, 16 processors), and what was left took longer size by
# size than together.
COMPILING = 2 / 3
RESOLUTION = 32  # a boundary is searched to 3 % of the size, where both winners are nearly equal


@dataclass
class Campaign:
    """One tuning.

    known: the records so far, which others may add to. keep: called with each record at once. first: the
    bucket that the waiting call needs. too_large: buckets that do not fit into memory, left out and added to.
    ahead: no call is waiting.
    """

    job: Job
    known: Callable[[], Mapping[Sizes, Record]]
    keep: Callable[[Record], None]
    first: Sizes
    too_large: set[Sizes]
    crossover: bool = True
    ahead: bool = False

    def run(self) -> bool:
        """Decide what is not known up to job.sizes, within the budget; True if nothing is left to do."""
        self.job = replace(self.job, sizes=_reach(self.job.sizes, self.known()))
        grid = self.job.config.bucket_grid(self.job.sizes)
        self.job.budget.start()
        try:
            self._decide(grid)
            self.job.listener.step("where winners change")
            searched = self._search_crossovers()
            done = all(self._settled(bucket) for bucket in grid)
            if done:
                self._mark_covered()
            return done and searched
        finally:
            self.job.budget.stop()

    def _settled(self, bucket: Sizes) -> bool:
        record = self.known().get(bucket)
        if bucket in self.too_large:
            return True
        return record is not None and record.complete and not self._default_changed(record)

    def _default_changed(self, record: Record) -> bool:
        """Whether the default tactic stands for something else than when the decision was made against it."""
        if record.default is None:
            return False
        try:
            like = inputs_like(
                self.job.config.profile(shapes_of(self.job.inputs), record.bucket), self.job.inputs
            )
            return resolved_default(self.job, like) not in (None, record.default)
        except (TypeError, NotImplementedError):
            return False  # it wants to see values

    def _decide(self, grid: Sequence[Sizes]) -> None:
        """Every bucket that has no decision with a share of the budget; then what the shares cut short, in
        full.

        That of a waiting call may take all, the others half of what is left, or more: cut any finer, a small
        budget would be spent on races that end before they have decided anything. A bucket whose half left nothing
        behind takes the rest at once: tuning again would else end at the same place.
        """
        tried: set[Sizes] = set()
        waiting = [bucket for bucket in spread(grid, self.first) if not self._settled(bucket)]
        if not waiting:
            return
        op, listener = self.job.key.op, self.job.listener
        if len(waiting) > 1 and self.job.budget.left > 0:
            listener.stage(f"compiling {op}", 1)
            self._compile(waiting)
        listener.stage(f"tuning {op}", len(waiting) + 1)
        for final in (False, True):
            for done, bucket in enumerate(waiting):
                left = self.job.time_left()
                if left <= 0:
                    return
                known = self.known().get(bucket)
                if self._settled(bucket) or (known is not None and not final):
                    continue  # also: another process has decided it meanwhile
                if known is not None and bucket in tried and not _was_cut_short(known):
                    continue
                listener.step(f"bucket {_text(bucket)}")
                tried.add(bucket)
                whole = final or (not done and not self.ahead)
                share = 1.0 if whole else max(0.5, 1 / (len(waiting) - done))
                record = self._measure(bucket, share=share * left)
                if (
                    record is None
                    and not whole
                    and bucket not in self.too_large
                    and (left := self.job.time_left()) > 0
                ):
                    self._measure(bucket, share=left)
                listener.done()

    def _compile(self, waiting: Sequence[Sizes]) -> None:
        """All buckets' candidates together, each kernel once, in COMPILING of the budget at most: a bucket alone
        would leave most processors idle at its end. What fails is found, and noted, when its bucket is tuned.
        """
        job, start = self.job, self.job.budget.spent
        most = COMPILING * job.budget.left
        jobs: dict[Any, Callable[[], object]] = {}
        needs: dict[tuple[Sizes, str], set[Any]] = {}
        if not job.compiles:
            return
        for bucket in waiting:
            try:
                found = Trial(job, bucket, math.inf).compile_jobs()
            except OutOfMemoryError:
                continue  # said when its turn comes
            for name, mine in found.items():
                needs[bucket, name] = set(mine)
                for key, one in mine.items():
                    jobs.setdefault(key, one)
        precompile_for(
            needs,
            jobs,
            job.compiled,
            lambda: job.budget.spent - start >= most,
            lambda done, of: job.listener.step(f"{done}/{of} kernels"),
        )

    def _measure(
        self, bucket: Sizes, *, only: Sequence[Record] | None = None, share: float = float("inf")
    ) -> Record | None:
        neighbour = _neighbour(bucket, self.known())
        deadline = self.job.budget.spent + share
        try:
            known = self.known().get(bucket)
            record = (self.job.decide or measure)(
                self.job,
                bucket,
                preferred=neighbour,
                only=only,
                deadline=deadline,
                unfinished=known if known is not None and not known.complete else None,
            )
        except OutOfMemoryError as error:
            self.too_large.add(bucket)
            warnings.warn(
                f"{self.job.key.op}: bucket {_text(bucket)} does not fit into memory: {error}",
                TuningWarning,
                stacklevel=2,
            )
            return None
        if record is not None:
            self.keep(replace(record, learned=only is not None))
        return record

    def _search_crossovers(self) -> bool:
        """True if every boundary between neighbours is known well enough."""
        if not self.crossover or len(self.job.sizes) != 1:
            return True
        return all(self._bisect(low[0], high[0]) for low, high in itertools.pairwise(sorted(self.known())))

    def _bisect(self, low: int, high: int) -> bool:
        """Measure between two sizes until the boundary is known; False if the budget ended before."""
        at_low, at_high = self.known()[(low,)], self.known()[(high,)]
        if record_name(at_low) == record_name(at_high) or high - low <= max(1, high // RESOLUTION):
            return True
        if self.job.time_left() <= 0:
            return False
        middle = (low + high) // 2
        self.job.listener.step(f"between {low} and {high} the winner changes, trying {middle}")
        if self._measure((middle,), only=(at_low, at_high)) is None:
            return (middle,) in self.too_large
        return self._bisect(low, middle) and self._bisect(middle, high)

    def _mark_covered(self) -> None:
        """Note on the largest bucket that sizes up to job.sizes have been tuned for."""
        records = self.known()
        if records and self.job.sizes != _reach((), records):
            self.keep(replace(records[max(records)], tuned_for=self.job.sizes))


def _was_cut_short(record: Record) -> bool:
    """Whether it was time that an unfinished decision wanted, and not a default that may run another day."""
    evidence = record.evidence
    return evidence.reason == "budget" or any(c.fate == "not measured" for c in evidence.candidates)


def _reach(sizes: Sizes, records: Mapping[Sizes, Record]) -> Sizes:
    """The largest of these sizes and those that finished tunings were asked for.

    Buckets are those of the reach: a generator that adds the size it is called with would else add one at
    each call.
    """
    asked = [record.tuned_for for record in records.values() if record.tuned_for]
    return tuple(map(max, zip(*filter(None, (sizes, *asked)), strict=True)))


def _neighbour(bucket: Sizes, known: Mapping[Sizes, Record]) -> Record | None:
    """The record of the nearest bucket, which wins ties here."""
    others = [b for b in known if b != bucket and known[b].status == "measured"]
    if not others:
        return None
    nearest = min(others, key=lambda b: (sum(abs(x - y) for x, y in zip(b, bucket, strict=True)), b))
    return known[nearest]


def spread(grid: Sequence[Bucket], first: Bucket) -> list[Bucket]:
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

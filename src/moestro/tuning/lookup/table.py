"""The look-up table that serves the decisions of one static key.

Which measured size answers for a size: the first one in the direction in which the map rounds, so that the
points a crossover search has learned between two buckets count as well; where there is none, the nearest. A
size beyond everything tuned gets the nearest measured one, marked as extrapolated. With one dynamic size the
answers are intervals, found once by bisection and then looked up with `bisect`: a table has one entry an
interval, whatever sizes it is asked for. A map that scales (TensorRT-LLM's `int(n * 0.25)` under expert
parallelism) is taken at its word: its answer is looked for among the measured sizes, not the size itself.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moestro.errors import TuningError
from moestro.tuning.spec.buckets import next_positive_power_of_2
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.specs import Sizes, TuningConfig

__all__ = ["IntervalTable", "PointTable", "Rounding", "Table", "label_of", "make_table", "roundings"]

POINTS_KEPT = 4096  # answers that a PointTable remembers; more are worked out again


@dataclass(frozen=True)
class Rounding:
    """How a size finds a measured size: a map, or a direction that replaces it."""

    map: Callable[[int], int] | None
    direction: int = 0  # 1 up, -1 down, 0 as the map has it

    def resolve(self, size: int, points: Sequence[int], scales: bool = False) -> int:
        """The point of `points` (ascending, not empty) that answers for a size.

        scales: the map does not round but sends sizes to buckets elsewhere (see `scales`).
        """
        direction = self.direction
        if scales:
            size, direction = self._mapped(size), 1
        elif not direction:
            bucket = self._mapped(size)
            direction = (bucket > size) - (bucket < size) or self._leaning(size)
        at = bisect_left(points, size) if direction >= 0 else bisect_right(points, size) - 1
        if not direction and 0 < at < len(points) and size - points[at - 1] < points[at] - size:
            at -= 1  # the nearest; of two equally near ones the larger
        return points[min(max(at, 0), len(points) - 1)]

    def scales(self, points: Sequence[int]) -> bool:
        """Whether the map sends sizes to buckets that are not around them, as int(n * 0.25) does for a buffer of
        which a quarter is filled. A map that rounds leaves its own buckets where they are.
        """
        if self.direction:
            return False
        around = {size for p in (*points[:64], points[-1]) for size in (p, 2 * p)}
        return any(self._mapped(bucket := self._mapped(size)) != bucket for size in around)

    def covered(self, points: Sequence[int], most: int, scales: bool) -> int:
        """The largest size that the points up to `most` answer for."""
        if not scales:
            return most
        low, high = 1, 2 * most
        while self._mapped(high) <= most and high < 1 << 48:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._mapped(middle) <= most else (low, middle)
        return low

    def _mapped(self, size: int) -> int:
        assert self.map is not None
        return self.map(size)

    def _leaning(self, size: int) -> int:
        """The direction of a map that sends this size to itself: that from which it draws a neighbour."""
        if self._mapped(size + 1) == size:
            return -1
        return 1 if size > 1 and self._mapped(size - 1) == size else 0

    def turns(self, points: Sequence[int], last: int) -> list[int]:
        """Sizes of 1..last, ascending, between which the answers only rise or only fall.

        A map may round up below one of its buckets and down above it (a list's map does, below its first), so
        the answers can fall as sizes rise: where the map meets its bucket, and at the points.
        """
        probes = {1, last, *points, *(1 << k for k in range(last.bit_length()))}
        if not self.direction:
            probes |= {self._mapped(size) for size in probes}
        around = {size + step for size in probes for step in (-1, 0, 1)}
        return sorted(size for size in around if 1 <= size <= last)

    def check_monotone(self, points: Sequence[int]) -> None:
        """Raise TuningError if the map goes down somewhere around these points."""
        if self.direction:
            return
        sizes = sorted({size for p in points for size in (p - 1, p, p + 1, p * 3 // 2) if size > 0})
        sizes = sizes[:: max(1, len(sizes) // 4096)]
        for low, high in itertools.pairwise(sizes):
            if self._mapped(low) > self._mapped(high):
                raise TuningError(
                    f"map_to_tuning_buckets must be monotone, but sends {low} to {self._mapped(low)} "
                    f"and {high} to {self._mapped(high)}"
                )


def roundings(config: TuningConfig, direction: int = 0) -> tuple[Rounding, ...]:
    """The rounding of every dynamic size of a configuration."""
    return tuple(Rounding(spec.bucket_of, direction) for spec in config.dynamic_tensor_specs)


class Table:
    """Answers for sizes. `find` gives a record and whether the sizes are within what was tuned."""

    covered: Sizes

    def find(self, sizes: Sizes) -> tuple[Record, bool]:
        raise NotImplementedError


@dataclass
class IntervalTable(Table):
    """For one dynamic size: sizes up to bounds[i], and beyond bounds[i-1], are answered by records[i]."""

    bounds: list[int]
    records: list[Record]
    covered: Sizes

    def find(self, sizes: Sizes) -> tuple[Record, bool]:
        at = bisect_left(self.bounds, sizes[0])
        return self.records[min(at, len(self.records) - 1)], sizes[0] <= self.covered[0]

    def extend(self, size: int) -> None:
        """Take everything up to the next power of two from `size` as answered, by the largest record."""
        self.bounds = [*self.bounds, next_positive_power_of_2(size)]
        self.records = [*self.records, self.records[-1]]


@dataclass
class PointTable(Table):
    """For none or several dynamic sizes: each size finds its coordinate; the nearest record has the
    coordinates.
    """

    by_bucket: Mapping[Sizes, Record]
    roundings: tuple[Rounding, ...]
    covered: Sizes
    grid: list[list[int]]  # the measured sizes, by dimension
    scales: list[bool]
    _found: dict[Sizes, Record] = field(default_factory=dict)

    def find(self, sizes: Sizes) -> tuple[Record, bool]:
        within = all(size <= most for size, most in zip(sizes, self.covered, strict=True))
        record = self._found.get(sizes)
        if record is None:
            record = self._search(sizes)
            if len(self._found) < POINTS_KEPT:
                self._found[sizes] = record
        return record, within

    def _search(self, sizes: Sizes) -> Record:
        point = tuple(
            rounding.resolve(max(1, size), points, scales)
            for rounding, size, points, scales in zip(
                self.roundings, sizes, self.grid, self.scales, strict=True
            )
        )
        if point in self.by_bucket:
            return self.by_bucket[point]
        return min(self.by_bucket.items(), key=lambda item: (_distance(point, item[0]), item[0]))[1]


def _distance(one: Sizes, other: Sizes) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(one, other, strict=True))


def make_table(records: Mapping[Sizes, Record], rounds: tuple[Rounding, ...]) -> Table | None:
    """The table for these records; None without any."""
    if not records:
        return None
    reach = [tuple(map(max, zip(r.bucket, r.tuned_for or r.bucket, strict=True))) for r in records.values()]
    most = tuple(max(sizes) for sizes in zip(*reach, strict=True))
    grid = [sorted({bucket[d] for bucket in records}) for d in range(len(rounds))]
    for rounding, points in zip(rounds, grid, strict=True):
        rounding.check_monotone(points)
    scales = [rounding.scales(points) for rounding, points in zip(rounds, grid, strict=True)]
    covered = tuple(map(Rounding.covered, rounds, grid, most, scales))
    if len(rounds) != 1:
        return PointTable(records, rounds, covered, grid, scales)
    turns = rounds[0].turns(grid[0], covered[0])
    bounds, answers = _intervals(lambda size: rounds[0].resolve(size, grid[0], scales[0]), turns)
    return IntervalTable(bounds, [records[(point,)] for point in answers], covered)


def _intervals(answer: Callable[[int], int], turns: Sequence[int]) -> tuple[list[int], list[int]]:
    """(upper ends, answers) of the intervals on which a function is constant, monotone between two turns."""
    bounds: list[int] = []
    answers: list[int] = []

    def split(low: int, low_answer: int, high: int, high_answer: int) -> None:
        """Intervals of [low, high): the one that ends at `high` stays open."""
        if low_answer == high_answer:
            return
        if high - low == 1:
            bounds.append(low)
            answers.append(low_answer)
            return
        middle = (low + high) // 2
        middle_answer = answer(middle)
        split(low, low_answer, middle, middle_answer)
        split(middle, middle_answer, high, high_answer)

    known = [(size, answer(size)) for size in turns]
    for (low, low_answer), (high, high_answer) in itertools.pairwise(known):
        split(low, low_answer, high, high_answer)
    last, final = known[-1]
    return [*bounds, last], [*answers, final]


def label_of(sizes: Sizes) -> Sizes:
    """What sizes beyond the tuned range are counted under: the next powers of two."""
    return tuple(next_positive_power_of_2(size) for size in sizes)

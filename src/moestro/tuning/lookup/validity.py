"""Where a decision may serve: a tactic that was measured at one size need not run at another.

A runner is asked by `validate_tactic(inputs, tactic)` if it has that, else by whether it still offers the tactic
(`get_valid_tactics`): with the inputs of a call, once for each size, and not again. Where sizes on both sides are
valid, so is what lies between; but not with a `validate_tactic` of its own rule ("multiples of 64"), unless the
runner says so (`valid_between = True`). Where a tactic is not valid, the next best of its evidence that is serves,
else the default, with one warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.inputs import inputs_like
from moestro.tuning.spec.keys import StaticKey, shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key, valid_tactics
from moestro.tuning.spec.specs import Sizes, TuningConfig

__all__ = ["DEFAULT_PICK", "Pick", "Validity"]

Pick = tuple[int, Any]  # (index of the runner, tactic)
DEFAULT_PICK: Pick = (0, DEFAULT_TACTIC)
SIZES_KEPT = 4096  # whose answers are remembered one by one
RUNS = {"winner", "finalist", "eliminated"}  # the fates of those that were timed


class Validity:
    """What is known of where one look-up's decisions may serve. It is forgotten when a decision comes."""

    def __init__(self, key: StaticKey) -> None:
        self.key = key
        self.by_size: dict[Any, Pick] = {}  # a size, or a tuple of sizes
        self._ranges: dict[Sizes, tuple[int, int]] = {}  # of a record's bucket: valid from ... to
        self._warned: set[tuple[Sizes, Any]] = set()

    def clear(self) -> None:
        self.by_size.clear()
        self._ranges.clear()

    def pick_of(self, record: Record | None) -> Pick:
        """The pick that a record stands for; the default without one."""
        if record is None:
            return DEFAULT_PICK
        return self.key.runners.index(record.runner), record.tactic

    def range_of(self, record: Record) -> tuple[int, int]:
        """The sizes between which a record's tactic is known to be valid; (1, 0) if none is."""
        return self._ranges.get(record.bucket, (1, 0))

    def ask(
        self,
        record: Record,
        config: TuningConfig,
        runners: Sequence[Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        sizes: Sizes,
        alike: Sequence[tuple[Sizes, int, int]],
    ) -> Pick:
        """What serves these inputs. alike: (bucket, first, last size) of all intervals with the record's pick."""
        wanted = self.pick_of(record)
        if _is_default(wanted[1]):
            return wanted
        question = _Question(config, runners, kwargs)
        if question.valid(wanted, inputs, sizes):
            if len(sizes) == 1 and alike and question.holds_between(wanted[0]):
                for bucket, first, last in alike:
                    self._extend(bucket, sizes[0], wanted, question, inputs, (first, last))
            else:
                self._remember(sizes, wanted)
            return wanted
        others = (pick for pick in self._others(record) if question.valid(pick, inputs, sizes))
        chosen = next(others, DEFAULT_PICK)
        self._remember(sizes, chosen)
        self._warn(record, sizes, wanted, chosen, question.error)
        return chosen

    def _extend(
        self,
        bucket: Sizes,
        size: int,
        wanted: Pick,
        question: _Question,
        inputs: Sequence[Any],
        ends: tuple[int, int],
    ) -> None:
        """Note between which sizes a pick that is valid at one is so, with the ends of an interval where shapes
        alone tell: between two of them the same tactic is valid, whatever buckets lie there.
        """
        low, high = self._ranges.get(bucket, (size, size))
        low, high = min(low, size), max(high, size)
        for end in ends:
            if not low <= end <= high and question.valid_by_shape(wanted, inputs, (end,)):
                low, high = min(low, end), max(high, end)
        self._ranges[bucket] = low, high

    def _remember(self, sizes: Sizes, pick: Pick) -> None:
        if len(self.by_size) >= SIZES_KEPT:
            self.by_size.clear()
        self.by_size[sizes[0] if len(sizes) == 1 else sizes] = pick

    def _others(self, record: Record) -> Iterator[Pick]:
        """The record's other candidates that are faster than the default, the best first."""
        known = [
            c
            for c in record.evidence.candidates
            if c.fate in RUNS and c.ratio is not None and c.ratio < 1 and c.runner in self.key.runners
        ]
        for c in sorted(known, key=lambda c: c.ratio or 0.0):
            if not (c.runner == record.runner and c.tactic == record.tactic):
                yield self.key.runners.index(c.runner), c.tactic

    def _warn(
        self, record: Record, sizes: Sizes, wanted: Pick, chosen: Pick, error: Exception | None
    ) -> None:
        mark = record.bucket, repr(wanted)
        if mark in self._warned:
            return
        self._warned.add(mark)
        at, bucket = (" x ".join(map(str, s)) or "this size" for s in (sizes, record.bucket))
        what = "the default" if _is_default(chosen[1]) else f"tactic {chosen[1]!r}"
        why = f" ({type(error).__name__}: {error})" if error is not None else ""
        warnings.warn(
            f"{self.key.op}: tactic {wanted[1]!r}, decided at {bucket}, is not valid at {at}{why}; {what} serves",
            TuningWarning,
            stacklevel=5,
        )


class _Question:
    """Whether runners take a tactic for some inputs."""

    def __init__(self, config: TuningConfig, runners: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.config, self.runners, self.kwargs = config, runners, kwargs
        self.error: Exception | None = None  # what a runner raised when it was asked

    def holds_between(self, index: int) -> bool:
        """Whether a tactic that is valid at two sizes is valid between."""
        runner = self.runners[index]
        own = callable(getattr(runner, "validate_tactic", None))
        return not own or bool(getattr(runner, "valid_between", False))

    def valid(self, pick: Pick, inputs: Sequence[Any], sizes: Sizes) -> bool:
        index, tactic = pick
        runner = self.runners[index]
        try:
            hook = getattr(runner, "validate_tactic", None)
            if callable(hook):
                return bool(hook(inputs, tactic))
            profile = self.config.profile(shapes_of(inputs), sizes)
            offered = valid_tactics(runner, inputs, profile, self.kwargs)
            wanted = _text(tactic, runner)
            return any(_text(one, runner) == wanted for one in offered)
        except TuningError:
            raise
        except Exception as error:
            self.error = error
            return False

    def valid_by_shape(self, pick: Pick, inputs: Sequence[Any], sizes: Sizes) -> bool:
        """The same for inputs of other sizes, without values; False if that cannot be told."""
        error = self.error
        try:
            like = inputs_like(self.config.profile(shapes_of(inputs), sizes), inputs)
            return self.valid(pick, like, sizes)
        except Exception:
            return False
        finally:
            self.error = error


def _text(tactic: Any, runner: Any) -> str:
    """What tells a tactic from all others: True is not 1."""
    return json.dumps(tactic_key(tactic, runner), sort_keys=True)


def _is_default(tactic: Any) -> bool:
    return type(tactic) is int and tactic == DEFAULT_TACTIC

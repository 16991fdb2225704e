"""Is a candidate's output the default tactic's? Compared once, before anything is timed.

What counts is what the default writes and writes again: its result, with everything inside, and the inputs and
arguments that it changes. To know that, it runs twice, or up to four times where the second run differs:

    1  the expected output; which of the inputs it has changed
    2  with every place of run 1 that outlives it overwritten (poison: NaN, or a changed bit). The same again: the
       poison does no harm, and every candidate starts from it, so that one which writes nothing is found out,
       whoever owns the output (an input, an `out=` argument, the runner's own buffer).
    3  with another poison: what still holds it is written by nobody (padding), and is not compared
    4  without: what differs now differs from run to run, and is not compared. What differs only with the poison
       in it is read as well as written: such an output starts as the inputs were, without poison.

Results that are made anew are overwritten when they have been looked at, or the next candidate that allocates an
output and writes nothing would find them there. How close is close enough: see compare.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.tuning.measure.bits import bits, disguise, overwritable, overwrite, place_of, same_bits
from moestro.tuning.measure.compare import differing, is_exact, why_different
from moestro.tuning.measure.leaves import Leaf, Opaque, leaves, tensors_in
from moestro.tuning.spec.keys import is_torch

__all__ = ["Reference"]

LARGE = 96.0  # the second poison: a float of every format


@dataclass
class Output:
    """One leaf of what the default gives. written: where it is poisoned (None: everywhere); counts: where it is
    compared.
    """

    path: str
    expected: Any
    place: Any = None  # the tensor that holds it from run to run, if there is one
    written: Any = None
    counts: Any = None


class Reference:
    """The default tactic's output for some inputs, and the inputs as they were before it ran."""

    def __init__(
        self,
        run: Callable[[], Any],
        inputs: Sequence[Any],
        written: Sequence[int],
        tolerance: Callable[[], float] | None,
        kwargs: Mapping[str, Any] | None = None,
        before: Mapping[int, Any] | None = None,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """written: which inputs an operation may write (the dynamic ones). before: copies of them from before
        anything ran, where preparation may have written them. hurry: time is over, one run must do.
        """
        self._run, self._tolerance, self.runs = run, tolerance, 1
        places = [(f"input {i}", inputs[i], (before or {}).get(i)) for i in written if _is_memory(inputs[i])]
        places += [(f"argument {p}", t, None) for p, t in tensors_in(dict(kwargs or {})) if _is_memory(t)]
        self._places = [
            Output(name, tensor.detach().clone() if was is None else was, tensor)
            for name, tensor, was in places
        ]
        self._poison = False
        self.restore()
        first = run()
        self.returns = bool(leaves(first))
        self._changed = {o.path for o in self._places if not same_bits(o.place, o.expected)}
        self._outputs = [Output(path, _keep(value)) for path, value in self._leaves(first)]
        if not self.returns and not hurry():
            self._find_written()
        if self._changed and not self.returns:  # what it only reads must never see poison
            self._outputs = [o for o in self._outputs if o.path in self._changed]
        if self._outputs and not hurry() and (self.returns or self._changed):
            self._learn(first)
        self.restore()

    @property
    def written(self) -> list[Any]:
        """The tensors that outlive a run and that the default writes."""
        places = [p.place for p in self._places if p.path in self._changed]
        return [*places, *(o.place for o in self._outputs if o.place is not None and o.written is None)]

    @property
    def outputs_changed(self) -> bool:
        """Whether the default writes an input or argument that it may write."""
        return bool(self._changed)

    # --- what a run leaves -------------------------------------------------------------------------------
    def _leaves(self, result: Any) -> list[Leaf]:
        """The result's leaves, then the inputs that the default changes (all of them if it returns nothing)."""
        found = leaves(result)
        only = self.returns or bool(self._changed)
        places = [o for o in self._places if o.path in self._changed] if only else self._places
        return [*found, *((o.path, o.place) for o in places)]

    def restore(self) -> None:
        """Put the inputs back as they were."""
        for place in self._places:
            overwrite(place.place, place.expected)

    def _start(self, alternative: bool = False) -> None:
        """As every run that is compared starts: the inputs restored, the outputs poisoned."""
        self.restore()
        if self._poison:
            for output in self._outputs:
                if output.place is not None:
                    _poison(output.place, output.expected, output.written, alternative)

    def _find_written(self) -> None:
        """Which inputs a default that returns nothing writes, also where the answer was there already: one more run,
        on the same values in other places, which stay valid.
        """
        for shift, place in enumerate(self._places, 1):  # each by its own: two equal ones must differ
            disguise(place.place, place.expected, shift)
        held = [o.place.detach().clone() for o in self._places]
        self.runs += 1
        self._run()
        pairs = zip(self._places, held, strict=True)
        self._changed |= {o.path for o, was in pairs if not same_bits(o.place, was)}

    # --- what counts -------------------------------------------------------------------------------------
    def _learn(self, first: Any) -> None:
        """Runs 2 to 4: see the module. `first` is alive, so that what is allocated anew lies elsewhere."""
        held = [value for _, value in self._leaves(first)]
        for output, value in zip(self._outputs, held, strict=True):
            output.place = value if _is_memory(value) else None
        self._poison = True
        second = self._again()
        if second is None:  # it raises, or gives something of another structure: compare without
            self._stop_poisoning()
            second = []
        else:
            stays = [
                _is_memory(value) and place_of(value) == place_of(output.place)
                for output, value in zip(self._outputs, second, strict=True)
            ]
            odd = [self._differs(o, v, whole_rows=False) for o, v in zip(self._outputs, second, strict=True)]
            if any(mask is not None for mask in odd):
                self._explain(odd, [v if s else None for v, s in zip(second, stays, strict=True)])
            for output, persists in zip(self._outputs, stays, strict=True):
                output.place = output.place if persists else None
        self._spoil(held)
        self._spoil(second)

    def _again(self, alternative: bool = False) -> list[Any] | None:
        """One more run of the default, as candidates start: its leaves; None if they are not the same ones."""
        self._start(alternative)
        self.runs += 1
        try:
            found = self._leaves(self._run())
        except Exception:
            return None
        alike = [path for path, _ in found] == [o.path for o in self._outputs] and all(
            not is_torch(o.expected) or (is_torch(v) and _alike(v, o.expected))
            for o, (_, v) in zip(self._outputs, found, strict=True)
        )
        return [value for _, value in found] if alike else None

    def _differs(self, output: Output, value: Any, whole_rows: bool = True) -> Any:
        """Where a value is not the expected one; None if nowhere."""
        if not is_torch(output.expected) or output.expected.is_meta or same_bits(value, output.expected):
            return None
        allowed = self._allowed(output.expected)
        mask = differing(value, output.expected, allowed, whole_rows=whole_rows)
        return mask if bool(mask.any()) else None

    def _explain(self, odd: list[Any], persistent: list[Any]) -> None:
        """Why the second run differs from the first, element by element. persistent: its leaves that hold what
        is there from run to run.
        """
        unwritten = [
            None if value is None else _is_poison(value, output.expected, False)
            for value, output in zip(persistent, self._outputs, strict=True)
        ]
        third = self._again(alternative=True)
        for output, value, never in zip(self._outputs, third or [], unwritten, strict=False):
            if never is None or not bool(never.any()):
                continue
            never = never & _is_poison(value, output.expected, True)
            was = next((p for p in self._places if place_of(p.place) == place_of(output.place)), None)
            if was is not None:  # what the first run has changed is written
                same = bits(was.expected) == bits(output.expected)
                never = never & (same.all(-1) if output.expected.dtype.is_complex else same)
            output.written = output.counts = ~never
        self._stop_poisoning()
        fourth = self._again()
        if third is None or fourth is None:
            return
        read = False
        for output, mask, value in zip(self._outputs, odd, fourth, strict=True):
            changes = self._differs(output, value)
            if changes is not None:
                output.counts = ~changes if output.counts is None else output.counts & ~changes
            if mask is not None:
                read = read or bool((mask if output.counts is None else mask & output.counts).any())
        self._poison = not read

    def _stop_poisoning(self) -> None:
        """No more poison, and none left in what the operation owns."""
        self._poison = False
        for output in self._outputs:
            if output.place is not None:
                overwrite(output.place, output.expected)
        self.restore()

    # --- candidates --------------------------------------------------------------------------------------
    def why_wrong(self, run: Callable[[], Any], intact: Callable[[], bool] = lambda: True) -> str | None:
        """Run a candidate; what is wrong with its output, or None. intact(): whether the weights are as they
        were, so that the default may be asked again.
        """
        self._start()
        found: list[Any] = []
        try:
            result = run()
            got = self._leaves(result)
            found = [value for _, value in got]
            why = self._compare(got)
            if why is None:
                return self._changes()
            return self._second_look(got, why) if intact() else why
        finally:
            self._spoil(found)
            self.restore()

    def _second_look(self, got: list[Leaf], why: str) -> str | None:
        """A difference counts where the default gives the same again: padding that nobody writes holds whatever
        the last candidate left in that memory.
        """
        kept = [(path, _keep(value)) for path, value in got]
        again = self._again()
        if again is None:
            return why
        grown = False
        for output, value in zip(self._outputs, again, strict=True):
            mask = self._differs(output, value)
            if mask is not None and float(mask.double().mean()) <= 0.5:
                before = output.counts
                output.counts = ~mask if before is None else before & ~mask
                grown = grown or before is None or bool((before != output.counts).any())
        return self._compare(kept) if grown else why

    def still_right(self) -> bool:
        """Whether the default gives what it gave."""
        self.restore()
        found = self._again()
        return (
            found is not None
            and self._compare([(o.path, value) for o, value in zip(self._outputs, found, strict=True)])
            is None
        )

    def _changes(self) -> str | None:
        """What a candidate has changed that the default leaves alone."""
        if not self.returns:
            return None  # then all of them have been compared
        for place in self._places:
            if place.path not in self._changed and not same_bits(place.place, place.expected):
                aliased = any(
                    o.place is not None and place_of(o.place) == place_of(place.place) for o in self._outputs
                )
                if not aliased:
                    return f"changes {place.path}, which the default leaves alone: differs from what it was"
        return None

    def _compare(self, got: list[Leaf]) -> str | None:
        if self._outputs and all(isinstance(o.expected, Opaque) for o in self._outputs):
            return (
                f"differs, for all that can be told: a result of type {self._outputs[0].expected.kind} cannot be "
                "compared (give it attributes, or tune with MeasurementPolicy(verify=False))"
            )
        if len(got) != len(self._outputs):
            return f"gives {len(got)} outputs, the default {len(self._outputs)}: differs in structure"
        alone = len(got) == 1
        for output, (path, value) in zip(self._outputs, got, strict=True):
            if path != output.path and not alone:
                return f"gives output {path or 'itself'} where the default gives {output.path}: differs in structure"
            why = self._why_wrong_leaf(value, output)
            if why is not None:
                return f"output {output.path or 0} {why}"
        return None

    def _why_wrong_leaf(self, value: Any, output: Output) -> str | None:
        expected = output.expected
        if is_torch(expected):
            if not is_torch(value):
                return f"is {type(value).__name__}, not {expected.dtype} {tuple(expected.shape)}"
            return why_different(value, expected, output.counts, self._allowed(expected))
        return None if _same(value, expected) else f"differs: it gives {value!r}, the default {expected!r}"

    def _allowed(self, expected: Any) -> float:
        if self._tolerance is not None:
            return float(self._tolerance())
        return 1e-2 if not is_exact(expected.dtype) and expected.dtype.itemsize < 4 else 1e-4

    def _spoil(self, values: Sequence[Any]) -> None:
        """Overwrite results that were made anew, if poison does no harm."""
        if not self._poison:
            return
        kept = {place_of(p.place)[:2] for p in self._places}
        kept |= {place_of(o.place)[:2] for o in self._outputs if o.place is not None}
        for value, output in zip(values, self._outputs, strict=False):
            fresh = _is_memory(value) and place_of(value)[:2] not in kept and output.place is None
            if fresh and is_torch(output.expected) and _alike(value, output.expected):
                _poison(value, output.expected, None, False)


def _is_memory(value: Any) -> bool:
    """Whether a value is a tensor that holds something."""
    strided = is_torch(value) and str(value.layout) == "torch.strided"
    return bool(strided and value.numel() > 0 and not value.is_meta)


def _alike(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype and one.device == other.device)


def _poison(place: Any, expected: Any, where: Any, alternative: bool) -> None:
    """Overwrite a tensor with what no right answer is, where it counts."""
    poison = bits(_poison_of(expected, alternative))
    with overwritable(place) as target:
        target = bits(target)
        if where is not None:
            poison = poison.where(where if where.dim() == poison.dim() else where[..., None], target)
        target.copy_(poison)


def _poison_of(expected: Any, alternative: bool) -> Any:
    """NaN, or a large number; of integers, booleans and floats of one byte the value with a bit changed, which
    stays about as large, so that what takes it for an index does not go far astray.
    """
    import torch

    if expected.dtype == torch.bool:
        return ~expected
    if expected.dtype.itemsize == 1 or is_exact(expected.dtype):
        return (bits(expected) ^ (2 if alternative else 1)).view(expected.dtype)
    return torch.full_like(expected, LARGE if alternative else math.nan)


def _is_poison(value: Any, expected: Any, alternative: bool) -> Any:
    """Where a value is the poison."""
    if value.dtype.itemsize > 1 and not is_exact(value.dtype) and not alternative:
        return value.isnan()
    same = bits(value) == bits(_poison_of(expected, alternative))
    return same.all(-1) if value.dtype.is_complex else same


def _keep(value: Any) -> Any:
    return value.detach().clone() if is_torch(value) else value


def _same(value: Any, expected: Any) -> bool:
    """Whether two leaves that are no tensors are the same: numbers but integers to 1e-4."""
    if isinstance(expected, Opaque):
        return isinstance(value, Opaque) and value.kind == expected.kind
    if hasattr(expected, "dtype") and hasattr(expected, "shape"):
        return _same_array(value, expected)
    if type(value) is not type(expected) and not {type(value), type(expected)} <= {int, float}:
        return False
    if isinstance(expected, float | complex) and isinstance(value, int | float | complex):
        close = abs(value - expected) <= 1e-4 * abs(expected)
        return close or value == expected or (value != value and expected != expected)
    return bool(value == expected)


def _same_array(value: Any, expected: Any) -> bool:
    import numpy as np

    if not hasattr(value, "dtype") or value.dtype != expected.dtype or value.shape != expected.shape:
        return False
    if expected.dtype.kind not in "fc":
        return bool(np.array_equal(value, expected))
    near = np.allclose(value, expected, rtol=1e-4, atol=0, equal_nan=True)
    return bool(near or np.linalg.norm(value - expected) <= 1e-4 * np.linalg.norm(expected))

"""Is a candidate's output the default tactic's? Compared once, before anything is timed.

The measure is the relative error norm |candidate - default| / |default| over every tensor of the output,
where the default is finite; a candidate that is not finite there is wrong. An operation that returns nothing
is judged by what it leaves in its dynamic inputs. Every run starts from the same inputs, so that one which
writes nothing does not pass for its predecessor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moestro.tuning.measure.inputs import is_torch

__all__ = ["Reference"]


class Reference:
    """The default tactic's output for some inputs, and the inputs as they were before it ran.

    written: which inputs an operation may write (the dynamic ones).
    """

    def __init__(
        self,
        run: Callable[[], Any],
        inputs: Sequence[Any],
        written: Sequence[int],
        tolerance: Callable[[], float] | None,
    ) -> None:
        self._inputs = inputs
        self._before = {i: inputs[i].clone() for i in written if is_torch(inputs[i])}
        self._tolerance = tolerance
        self._expected = [_keep(value) for value in self._outputs(run())]
        self.restore()

    def restore(self) -> None:
        """Put the inputs back as they were."""
        for i, value in self._before.items():
            self._inputs[i].copy_(value)

    def why_wrong(self, run: Callable[[], Any]) -> str | None:
        """Run a candidate; what is wrong with its output, or None."""
        self.restore()
        try:
            got = self._outputs(run())
            return self._compare(got)
        finally:
            self.restore()

    def _outputs(self, result: Any) -> list[Any]:
        values = _leaves(result)
        return values or [self._inputs[i] for i in self._before]

    def _compare(self, got: list[Any]) -> str | None:
        if len(got) != len(self._expected):
            return f"gives {len(got)} outputs, the default {len(self._expected)}"
        for i, (value, expected) in enumerate(zip(got, self._expected, strict=True)):
            if is_torch(expected):
                why = self._compare_tensors(value, expected)
            else:
                same = value == expected or (
                    _is_number(value) and math.isclose(value, expected, rel_tol=1e-4)
                )
                why = None if same else f"gives {value!r}, the default {expected!r}"
            if why is not None:
                return f"output {i} {why}"
        return None

    def _compare_tensors(self, value: Any, expected: Any) -> str | None:
        if not is_torch(value) or value.shape != expected.shape or value.dtype != expected.dtype:
            shape = getattr(value, "shape", None)
            return f"is {getattr(value, 'dtype', type(value))} {shape}, not {expected.dtype} {expected.shape}"
        if value.is_meta or not value.numel():
            return None
        want, have = expected.double(), value.double()
        finite = want.isfinite()
        want, have = want.where(finite, 0.0), have.where(finite, 0.0)
        scale = float(want.norm())
        error = float((have - want).norm()) / scale if scale else float(have.norm())
        allowed = self._allowed(expected)
        if error <= allowed:
            return None
        return f"differs from the default's by {error:.3g} (relative norm; {allowed:.3g} is allowed)"

    def _allowed(self, expected: Any) -> float:
        if self._tolerance is not None:
            return float(self._tolerance())
        return 1e-2 if expected.dtype.is_floating_point and expected.dtype.itemsize < 4 else 1e-4


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keep(value: Any) -> Any:
    return value.clone() if is_torch(value) else value


def _leaves(result: Any) -> list[Any]:
    """The tensors and numbers in a result of tuples, lists and dicts."""
    if is_torch(result) or _is_number(result):
        return [result]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in _leaves(part)]
    if isinstance(result, dict):
        return [leaf for part in result.values() for leaf in _leaves(part)]
    return []

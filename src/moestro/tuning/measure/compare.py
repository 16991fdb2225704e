"""Is one tensor another, as far as rounding goes? By the norm of the whole, of every row and of every block.

A norm over everything hides what is small: one wrong row of 65,536 is 0.4 % of it. So rows (the last dimension)
may differ by 10 times what the whole may, and blocks of 64 in a row by the square root of it: one lost row or one
lost element of a block is 100 % or 12 % there, whatever the tolerance, while the rounding of a sum stays far
below. A row or block that is smaller than the median one is measured against the median: what cancels to nearly
nothing has no relative accuracy. Integers and booleans are exact; NaN and infinities must be where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moestro.tuning.measure.bits import same_bits

__all__ = ["differing", "why_different"]

BLOCK = 64
ROWS = 10.0  # times the tolerance of the whole
CHUNK = 1 << 22  # elements compared at a time: their float64 copies take 32 MiB each
# The values of float4_e2m1fn_x2, by its bits.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def is_exact(dtype: Any) -> bool:
    """Whether values of a dtype are compared exactly."""
    return not (dtype.is_floating_point or dtype.is_complex)


def why_different(value: Any, expected: Any, counts: Any, allowed: float) -> str | None:
    """What is wrong with `value`, or None. counts: a boolean tensor of where to look; None: everywhere."""
    if tuple(value.shape) != tuple(expected.shape) or value.dtype != expected.dtype:
        return f"is {value.dtype} {tuple(value.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if value.is_meta or not value.numel():
        return None
    if value.device != expected.device:
        return f"differs in its device: it is on {value.device}, not {expected.device}"
    if is_exact(value.dtype):
        wrong = value != expected
        return _count("differs", wrong if counts is None else wrong & counts)
    if same_bits(value, expected):
        return None
    have, want = _table(value), _table(expected)
    if counts is not None:
        counts = _rows(counts)
        counts = counts.repeat_interleave(want.shape[-1] // counts.shape[-1], -1)
    return _Norms(allowed).why(have, want, counts)


def differing(value: Any, expected: Any, allowed: float, *, whole_rows: bool = True) -> Any:
    """Where two tensors of one shape and dtype are not the same: a boolean tensor of their shape.

    whole_rows: a row of which a quarter differs does so as a whole: some of its elements are alike by chance.
    """
    import torch

    if is_exact(value.dtype) or not value.numel():
        return value != expected
    have, want = _table(value), _table(expected)
    wrong = torch.empty(want.shape, dtype=torch.bool, device=want.device)
    for part in _chunks(want):
        a, b = have[part].double(), want[part].double()
        special = ~(a.isfinite() & b.isfinite())
        size = b.where(b.isfinite(), 0.0).abs()
        limit = math.sqrt(allowed) * size.maximum(size.mean(-1, keepdim=True))
        here = torch.where(special, ~_same_special(a, b), (a - b).abs() > limit)
        wrong[part] = here | (here.double().mean(-1, keepdim=True) >= 0.25) if whole_rows else here
    parts = wrong.numel() // value.numel()  # numbers in one element: two of complex and packed ones
    return wrong.reshape(*value.shape, parts).any(-1)


def _chunks(table: Any) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, table.shape[-1]))
    for start in range(0, len(table), step):
        yield slice(start, start + step)


class _Norms:
    """Sums of squares over blocks, gathered in chunks of rows."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed

    def why(self, have: Any, want: Any, counts: Any) -> str | None:
        import torch

        errors, norms = [], []
        for part in _chunks(want):
            a, b = have[part].double(), want[part].double()
            if counts is not None:
                a, b = a.where(counts[part], 0.0), b.where(counts[part], 0.0)
            special = ~b.isfinite() | ~a.isfinite()
            why = _count("differs (not finite where the other is)", special & ~_same_special(a, b))
            if why is not None:
                return why
            a, b = a.where(~special, 0.0), b.where(~special, 0.0)
            errors.append(_blocks((a - b).square()))
            norms.append(_blocks(b.square()))
        return self._judge(torch.cat(errors), torch.cat(norms))

    def _judge(self, errors: Any, norms: Any) -> str | None:
        """errors, norms: sums of squares [rows, blocks]."""
        whole, size = float(errors.sum().sqrt()), float(norms.sum().sqrt())
        error = whole / size if size else whole
        if error > self.allowed:
            text = f"differs from the default's by {error:.3g} (relative norm; {self.allowed:.3g} is allowed)"
            return text
        rows = _relative(errors.sum(-1), norms.sum(-1))
        blocks = _relative(errors, norms)
        for name, found, limit in (
            ("row", rows, ROWS * self.allowed),
            ("block", blocks, math.sqrt(self.allowed)),
        ):
            worst = float(found.max())
            if worst > limit:
                row = int(found.argmax()) // (found.shape[1] if found.dim() > 1 else 1)
                return f"differs from the default's by {worst:.3g} in a {name} of row {row} ({limit:.3g} is allowed)"
        return None


def _relative(errors: Any, norms: Any) -> Any:
    """Roots of sums of squares, relative; what is smaller than the median is measured against the median."""
    there = norms[norms > 0]
    floor = there.median() if there.numel() else norms.new_ones(())
    return (errors / norms.maximum(floor)).sqrt()


def _blocks(squares: Any) -> Any:
    """Sums over blocks of the last dimension: [rows, blocks], in float64."""
    import torch

    rows, columns = squares.shape
    if columns <= BLOCK:
        return squares.sum(-1, keepdim=True)
    return torch.nn.functional.pad(squares, (0, -columns % BLOCK)).view(rows, -1, BLOCK).sum(-1)


def _same_special(one: Any, other: Any) -> Any:
    """Where both are NaN, or the same infinity."""
    return (one.isnan() & other.isnan()) | (one == other)


def _table(tensor: Any) -> Any:
    """A floating tensor as rows [N, C] that can be computed with."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj().reshape(tensor.shape or (1,))).flatten(-2)
    if tensor.dtype.itemsize == 1:
        tensor = _small(tensor)
    return _rows(tensor)


def _rows(tensor: Any) -> Any:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _small(tensor: Any) -> Any:
    """float8 and float4 values as float32."""
    import torch

    if str(tensor.dtype) != "torch.float4_e2m1fn_x2":
        return tensor.float()
    both = tensor.view(torch.uint8)
    table = torch.tensor(E2M1, device=tensor.device)
    return torch.stack([table[(both & 15).long()], table[(both >> 4).long()]], -1).flatten(-2)


def _count(text: str, wrong: Any) -> str | None:
    count = int(wrong.sum())
    if not count:
        return None
    first = int(wrong.reshape(-1).int().argmax())
    return f"{text} from the default's in {count} of {wrong.numel()} values, the first at {first}"

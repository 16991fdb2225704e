"""Tensors as bits: copied, compared and overwritten whatever their dtype, mode or gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["bits", "disguise", "overwritable", "overwrite", "place_of", "same_bits"]


def bits(tensor: Any) -> Any:
    """The tensor as integers of its item size: NaNs compare, and no dtype is without equality."""
    import torch

    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.dtype.itemsize])


def same_bits(one: Any, other: Any) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    import torch

    return bool(torch.equal(bits(one), bits(other)))


@contextlib.contextmanager
def overwritable(tensor: Any) -> Iterator[Any]:
    """The tensor, to be written in place: also one that was made under inference_mode or wants a gradient."""
    import torch

    with torch.inference_mode(True) if tensor.is_inference() else torch.no_grad():
        yield tensor.detach()


def disguise(tensor: Any, value: Any, shift: int = 1) -> None:
    """Give a tensor a value's elements `shift` places on: others where that can be, and all of them valid."""
    rows = value.dim() > 0 and len(value) > 1
    if rows or (value.dim() and value.dtype.is_floating_point):
        overwrite(tensor, value.roll(shift, 0 if rows else -1))


def overwrite(tensor: Any, value: Any) -> None:
    """tensor[...] = value, a tensor of its shape, or a number."""
    with overwritable(tensor) as target:
        target.copy_(value) if hasattr(value, "shape") else target.fill_(value)


def place_of(tensor: Any) -> tuple[Any, ...]:
    """Where a tensor lies: two with the same place are the same memory."""
    storage = tensor.untyped_storage().data_ptr()
    return str(tensor.device), storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())

"""What all format classes share: moving their pieces about without looking into them, and chunks of rows.

A format class is a frozen dataclass whose fields are its pieces, tensors with the same leading dimensions and
the experts first. Everything here treats the pieces alike; values are the business of the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from math import prod
from typing import Any, ClassVar, Self

import torch

from moestro.errors import DeviceError, ShapeError
from moestro.formats.base import CHECKPOINT
from moestro.formats.checks import require_dtype, require_float_dtype, require_one_device, require_shape

# Elements worked on at once. Measured on 2 cores for [1536, 2048]: quantising takes 9 ms in chunks of 2^18 to
# 2^20 and 15 in 2^16, dequantising 1.4 ms from 2^20 on, 2.4 in 2^18 and 4 in 2^16: threads start for each.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 24
# Quantising makes 25 passes, which pay in a core's own cache: one core takes 7.3 ns a value in chunks of 2^17 and
# 17.3 in 2^20.
QUANTISE_CHUNK = 1 << 17


class Pieces:
    """The part of FormatTensor that is the same for every format in the checkpoint layout."""

    layout: ClassVar[str] = CHECKPOINT
    piece_names: ClassVar[tuple[str, ...]]  # the fields, in order; torch.compile cannot read dataclass fields

    @property
    def pieces(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.piece_names)

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return self.pieces[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    def expert(self, index: int) -> Self:
        """[..., R, C] at `index` of the first dimension, without a copy."""
        self._require_experts(index, index + 1)
        return type(self)(*(piece[index] for piece in self.pieces))

    def experts(self, start: int, stop: int) -> Self:
        """[stop - start, ..., R, C]: a range of the first dimension, without a copy."""
        self._require_experts(start, stop)
        return type(self)(*(piece[start:stop] for piece in self.pieces))

    def to(self, device: torch.device | str) -> Self:
        """The same tensor on `device`; itself if it is there."""
        moved = [piece.to(device) for piece in self.pieces]
        return self if all(a is b for a, b in zip(moved, self.pieces, strict=True)) else type(self)(*moved)

    def contiguous(self) -> Self:
        """The same tensor with contiguous pieces; itself if they are."""
        if all(piece.is_contiguous() for piece in self.pieces):
            return self
        return type(self)(*(piece.contiguous() for piece in self.pieces))

    def __reduce__(self) -> Any:
        return reduced(self)

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError, naming piece and expert, for scales of [E, ...] that no quantiser makes; start: the number of
        the first expert. Waits for the device.
        """

    def to_checkpoint(self) -> Self:
        """This tensor: it is in the checkpoint layout."""
        return self

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """E tensors [..., R, C] to one [E, ..., R, C].

        ShapeError, DTypeError or DeviceError where the parts differ.
        """
        return cls(*(_join(torch.stack, pieces, 0) for pieces in cls._matching(parts)))

    @classmethod
    def cat_experts(cls, parts: Sequence[Self]) -> Self:
        """Tensors [E_i, ..., R, C] to one [ΣE_i, ..., R, C]."""
        for i, part in enumerate(parts):
            part._require_experts(0, part.pieces[0].shape[0], f"parts[{i}]")
        return cls(*(_join(torch.cat, pieces, 0) for pieces in cls._matching(parts, but=0)))

    @classmethod
    def _matching(cls, parts: Sequence[Self], but: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """The parts' pieces, field by field; they agree in dtype, device and all dimensions `but` one."""
        if not parts:
            raise ShapeError("parts must hold at least one tensor, got none")
        columns = list(zip(*(part.pieces for part in parts), strict=True))
        for name, column in zip(cls.piece_names, columns, strict=True):
            first = column[0]
            for i, piece in enumerate(column):
                expected = list(first.shape)
                if but is not None:
                    expected[but] = piece.shape[but]
                label = f"parts[{i}].{name}"
                require_dtype(label, piece, first.dtype)
                require_shape(label, piece, tuple(expected), f"as parts[0].{name}")
                require_one_device(**{f"parts[0].{name}": first, label: piece})
        return iter(columns)

    def _require_experts(self, start: int, stop: int, name: str = "self") -> None:
        shape = self.pieces[0].shape
        if len(shape) < 3:
            raise ShapeError(f"{name} must be a tensor [E, R, C] of experts, got {list(shape)}")
        if not 0 <= start <= stop <= shape[0]:
            raise ShapeError(f"experts must be within [0, {shape[0]}), got [{start}, {stop})")


Picklable = tuple[torch.Tensor, torch.dtype]


def to_picklable(tensor: torch.Tensor) -> Picklable:
    """A tensor that pickle can write and read, and the dtype to see it in."""
    plain = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
    return plain, tensor.dtype


def from_picklable(value: Picklable) -> torch.Tensor:
    """What to_picklable was given."""
    tensor, dtype = value
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def reduced(tensor: Any) -> Any:
    """What `__reduce__` of a format tensor gives, a dataclass of tensors and plain values: float8 ones as bytes, for
    pickle alone cannot read those back (torch 2.13).
    """
    values = {f.name: getattr(tensor, f.name) for f in fields(tensor)}
    tensors = {name: to_picklable(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return _unpickled, (type(tensor), tensors, {k: v for k, v in values.items() if k not in tensors})


def _unpickled(cls: Callable[..., Any], tensors: dict[str, Picklable], rest: dict[str, Any]) -> Any:
    return cls(**{name: from_picklable(value) for name, value in tensors.items()}, **rest)


def dense_out(
    out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out`, if it can take dense values of this shape, dtype and device; a new tensor without one."""
    require_float_dtype(dtype)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    require_dtype("out", out, dtype)
    require_shape("out", out, shape, "the dense shape")
    if out.device != device:
        raise DeviceError(f"out must be on {device}, got {out.device}")
    if not out.is_contiguous():
        raise ShapeError(f"out must be contiguous, got strides {list(out.stride())}")
    return out


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., C] as [..., C/block, block]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def magnitude(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """max |x| over `dims` in float32, without a copy of x; 0 where x is empty, NaN where it holds one."""
    if 0 in (x.shape[dim] for dim in dims):
        return x.sum(dims).float()
    if dims == (-1,) and x.dtype == torch.float32:
        # Without its sign a float compares as its bits do, NaN above all: 0.3 ns a value in blocks of 16, not 1.8.
        return (x.view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
    return torch.maximum(-x.amin(dims), x.amax(dims)).float().abs_()  # abs: -0 is no magnitude


def join_rows(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the rows, the last dimension but one."""
    return _join(torch.cat, pieces, -2)


def _join(how: Callable[..., torch.Tensor], pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat or torch.stack; of float8 tensors as bytes, since not every torch joins those."""
    dtype = pieces[0].dtype
    if dtype.itemsize > 1:
        return how(list(pieces), dim=dim)
    return how([piece.view(torch.uint8) for piece in pieces], dim=dim).view(dtype)


def matrices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The matrices [R, *] of tensors [..., R, *] with the same leading dimensions, together."""
    count = prod(tensors[0].shape[:-2])
    return zip(*(t.reshape(count, *t.shape[-2:]) for t in tensors), strict=True)


def row_chunks(*tensors: torch.Tensor, chunk: int = CPU_CHUNK) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the same rows of each tensor [..., R, *], a chunk at a time; the first decides how many rows.

    chunk: values of the first in a chunk, on a CPU.

    Under torch.compile everything is one chunk, which needs no guard on the number of rows.
    """
    columns, rows = tensors[0].shape[-1], tensors[0].shape[-2]
    if torch.compiler.is_compiling():
        yield tensors
        return
    step = max(1, (chunk if tensors[0].device.type == "cpu" else DEVICE_CHUNK) // max(1, columns))
    for matrix in matrices(*tensors):
        for start in range(0, rows, step):
            yield tuple(t[start : start + step] for t in matrix)

"""What a Gluon kernel computes with, on the CPU: tensors, pointers and shared memory, without their layouts.

`Gl` stands for the language (`gl`, and `tl` where functions are shared). A tensor that a running wgmma will write
has no value before it was waited for; a pointer knows its buffer, and an access beyond it raises; division of
negative integers raises, as C and Python differ there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ptx_words
import torch
from triton.experimental.gluon import language as gluon_language


class Tensor:
    """An immutable value; `data` is None while a product that runs is to write it."""

    def __init__(self, data: torch.Tensor | None) -> None:
        self._data = data

    @property
    def data(self) -> torch.Tensor:
        if self._data is None:
            raise AssertionError("a sum was used while its wgmma may still run")
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def complete(self, data: torch.Tensor) -> None:
        self._data = data

    def to(self, dtype: torch.dtype) -> Tensor:
        return Tensor(self.data.to(dtype))

    def __getitem__(self, at: Any) -> Tensor:
        return Tensor(self.data[at])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def plain(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value


def _binary(name: str, swapped: bool = False) -> Callable[[Any, Any], Any]:
    operation = getattr(torch.Tensor, f"__{name}__")

    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = torch.as_tensor(plain(self)), torch.as_tensor(plain(other))
        assert not (a.ndim and b.ndim) or a.ndim == b.ndim, f"ranks differ: {a.shape}, {b.shape}"
        if name in ("floordiv", "mod") and (bool((a < 0).any()) or bool((b < 0).any())):
            raise AssertionError("a quotient of negative integers")
        result: torch.Tensor = operation(b, a) if swapped else operation(a, b)
        return Tensor(result)

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "rshift", "lshift"):
    setattr(Tensor, f"__{_name}__", _binary(_name))
    setattr(Tensor, f"__r{_name}__", _binary(_name, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(_name))


class Pointer:
    """Addresses in one buffer, in elements."""

    def __init__(self, buffer: torch.Tensor, offsets: torch.Tensor) -> None:
        self.buffer, self.offsets = buffer, offsets
        self.dtype = SimpleNamespace(element_ty=buffer.dtype)

    @classmethod
    def to_start(cls, tensor: torch.Tensor) -> Pointer:
        assert tensor.is_contiguous()
        return cls(tensor.view(-1), torch.tensor(0))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.buffer, self.offsets + torch.as_tensor(plain(offset)).to(torch.int64))

    def reached(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets, mask), of one shape; what is not masked out lies in the buffer."""
        wanted = torch.as_tensor(True if mask is None else plain(mask))
        offsets, wanted = torch.broadcast_tensors(self.offsets, wanted)
        outside = wanted & ((offsets < 0) | (offsets >= self.buffer.numel()))
        if bool(outside.any()):
            raise AssertionError(f"address {int(offsets[outside][0])} of {self.buffer.numel()} elements")
        return offsets, wanted

    def read(self, mask: Any = None, other: Any = 0) -> torch.Tensor:
        offsets, wanted = self.reached(mask)
        found = self.buffer[torch.where(wanted, offsets, 0)]
        return torch.where(wanted, found, torch.as_tensor(plain(other)).to(found.dtype))


class Shared:
    """A view of shared memory; `place` tells views of different buffers of a ring apart."""

    def __init__(self, data: torch.Tensor, place: tuple[int, ...]) -> None:
        self.data, self.place = data, place

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.data)
        return Shared(self.data[int(i)], (*self.place, int(i)))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.data.shape[dim]
        return Shared(self.data.narrow(dim, start, length), self.place)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.place)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.place)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.data.clone())


class ProgramExit(BaseException):
    """What the instruction `exit` does to a partition."""


def poison(tensor: torch.Tensor) -> None:
    """NaN, or where all bits are numbers, ones."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


class Gl:
    """The language; what needs the machine (program ids, warp specialisation) is in gluon_machine.py."""

    int8, int16, int32, int64 = torch.int8, torch.int16, torch.int32, torch.int64
    float32, bfloat16, float8e4nv = torch.float32, torch.bfloat16, torch.float8_e4m3fn
    static_range = range
    BlockedLayout = gluon_language.BlockedLayout
    SliceLayout = staticmethod(
        lambda dim, parent: (dim, parent)
    )  # of any layout, one that is not known here too
    DotOperandLayout = gluon_language.DotOperandLayout
    DistributedLinearLayout = gluon_language.DistributedLinearLayout
    NVMMADistributedLayout = gluon_language.NVMMADistributedLayout
    NVMMASharedLayout, SwizzledSharedLayout = (
        gluon_language.NVMMASharedLayout,
        gluon_language.SwizzledSharedLayout,
    )

    @staticmethod
    def arange(first: int, end: int, layout: Any = None) -> Tensor:
        return Tensor(torch.arange(first, end, dtype=torch.int32))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return Tensor(torch.zeros(*shape, dtype=dtype))

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        return Tensor(torch.minimum(*_alike(a, b)))

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        return Tensor(torch.maximum(*_alike(a, b)))

    @staticmethod
    def max(a: Tensor, axis: int) -> Tensor:
        return Tensor(a.data.amax(axis))

    @staticmethod
    def abs(a: Tensor) -> Tensor:
        return Tensor(a.data.abs())

    @staticmethod
    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return Tensor((a.data.double() * b.data.double() + c.data.double()).float())

    @staticmethod
    def exp(a: Tensor) -> Tensor:
        return Tensor(a.data.exp())

    @staticmethod
    def where(condition: Tensor, a: Any, b: Any) -> Tensor:
        return Tensor(torch.where(condition.data, *_alike(a, b)))

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        return Tensor(pointer.read(mask, other))

    @staticmethod
    def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
        offsets, wanted = pointer.reached(mask)
        values = value.data.expand(offsets.shape)
        assert values.dtype == pointer.buffer.dtype
        pointer.buffer[offsets[wanted]] = values[wanted]

    @staticmethod
    def expand_dims(a: Tensor, axis: int) -> Tensor:
        return Tensor(a.data.unsqueeze(axis))

    @staticmethod
    def convert_layout(a: Tensor, layout: Any) -> Tensor:
        return a

    @staticmethod
    def reshape(a: Tensor, shape: Sequence[int]) -> Tensor:
        return Tensor(a.data.reshape(*shape))

    @staticmethod
    def permute(a: Tensor, order: Sequence[int]) -> Tensor:
        return Tensor(a.data.permute(*order))

    @staticmethod
    def join(a: Tensor, b: Tensor) -> Tensor:
        return Tensor(torch.stack([a.data, b.data], -1))

    @staticmethod
    def split(a: Tensor) -> tuple[Tensor, Tensor]:
        first, second = a.data.unbind(-1)
        return Tensor(first), Tensor(second)

    @staticmethod
    def inline_asm_elementwise(text: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool,
                               pack: int) -> Any:  # fmt: skip
        if text == "exit;":
            raise ProgramExit
        several = isinstance(dtype, tuple)
        inputs = [torch.as_tensor(plain(a)) for a in args]
        found = ptx_words.run(text, inputs, dtype if several else (dtype,), pack)
        return tuple(map(Tensor, found)) if several else Tensor(found[0])


def _alike(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one dtype: that of the one which was a tensor."""
    first, second = plain(a), plain(b)
    if not isinstance(first, torch.Tensor) and not isinstance(second, torch.Tensor):
        return torch.tensor(first), torch.tensor(second)
    if not isinstance(first, torch.Tensor):
        return torch.tensor(first, dtype=second.dtype), second
    return first, torch.as_tensor(second).to(first.dtype)

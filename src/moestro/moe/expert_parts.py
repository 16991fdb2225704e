"""What weights are made from: experts that come one after the other, and the checks of their parts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats.base import FormatTensor
from moestro.formats.pieces import Pieces


class ExpertSource(Protocol):
    """So many experts' (gate_up [2I, H], down [H, I]), one after the other: a list, or what makes them when asked."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[FormatTensor, FormatTensor]]: ...


@dataclasses.dataclass(frozen=True)
class OneExpert:
    """One expert's matrices, for what they say of all."""

    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None
    gate_up_input_scale: Any = None
    down_input_scale: Any = None


class Quantized:
    """Dense experts, quantised when they are asked for."""

    def __init__(self, quantize: Any, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self._quantize, self._gate_up, self._down = quantize, gate_up, down

    def __len__(self) -> int:
        return len(self._gate_up)

    def __iter__(self) -> Iterator[tuple[FormatTensor, FormatTensor]]:
        for gate_up, down in zip(self._gate_up, self._down, strict=True):
            yield self._quantize(gate_up), self._quantize(down)


def exactly(count: int, experts: Any) -> Iterator[Any]:
    """The experts; ShapeError unless they are as many as they say."""
    seen = 0
    for seen, one in enumerate(itertools.islice(experts, count + 1), 1):
        if seen <= count:
            yield one
    if seen != count:
        raise ShapeError(f"experts must give as many as its length says, {count}, got {seen}")


def check_format_tensor(name: str, value: object, dimensions: int = 3) -> None:
    if not isinstance(value, FormatTensor):
        hint = "; ExpertWeights.from_dense takes dense tensors" if isinstance(value, torch.Tensor) else ""
        raise FormatError(f"{name} must be a tensor of moestro.formats, got {type(value).__name__}{hint}")
    if len(value.shape) != dimensions:
        wanted = "[L, rows, columns]" if dimensions == 3 else "[rows, columns]"
        raise ShapeError(f"{name} must have {dimensions} dimensions {wanted}, got {list(value.shape)}")


def check_side(
    name: str, value: torch.Tensor | None, shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...]
) -> None:
    if value is None:
        return
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ShapeError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        raise DTypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a gradient of this one would end in: itself, or what it was computed from."""
    if tensor.is_leaf:
        yield tensor
        return
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        todo.extend(following for following, _ in node.next_functions)


def looked_at(experts: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """The experts as they come, once their shapes are found to be the first's and their scales to be scales: what is
    packed is not looked at again.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for index, pair in enumerate(experts):
        for name, part in zip(("gate_up", "down"), pair, strict=True):
            if tuple(part.shape) != shapes.setdefault(name, tuple(part.shape)):
                raise ShapeError(
                    f"{name} of expert {index} must be {list(shapes[name])} as of expert 0, got {list(part.shape)}"
                )
            if isinstance(part, Pieces):
                type(part)(*(piece[None] for piece in part.pieces)).check_scales(name, index)
        yield pair

"""The shapes of all inputs at one bucket, dimension by dimension: what a runner is asked for tactics with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Dim", "DynamicDim", "Initializer", "OptimizationProfile", "Shape", "StaticDim"]

Shape = tuple[int, ...]
Initializer = Callable[[Sequence[int], Any, Any], Any]  # (shape, dtype, device) -> tensor


@dataclass(frozen=True)
class StaticDim:
    """A dimension that never changes."""

    val: int

    @property
    def opt(self) -> int:
        """The size that is measured."""
        return self.val


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that changes; `opt` is the size that is measured."""

    min: int
    opt: int
    max: float  # an integer, or infinity above the last bucket


Dim = StaticDim | DynamicDim


@dataclass
class OptimizationProfile:
    """The shapes of all inputs at one bucket; an input that is not a tensor has shape (0,).

    Both may be left out, as in TensorRT-LLM: OptimizationProfile() is the profile of one input of no
    dimensions.
    """

    shapes: list[list[Dim]] = field(default_factory=lambda: [[]])
    tensor_initializers: list[Initializer | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        missing = len(self.shapes) - len(self.tensor_initializers)
        self.tensor_initializers = [*self.tensor_initializers, *[None] * missing]

    def get_opt_shapes(self) -> tuple[Shape, ...]:
        """The sizes that are measured."""
        return tuple(tuple(dim.opt for dim in shape) for shape in self.shapes)

    def get_hash_key(self) -> tuple[Shape, ...]:
        """What tells this profile from others."""
        return self.get_opt_shapes()

    def is_dynamic(self, index: int) -> bool:
        """Whether input `index` has a dimension that is set by the bucket."""
        return any(isinstance(dim, DynamicDim) for dim in self.shapes[index])

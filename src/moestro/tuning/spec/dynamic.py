"""What may change between calls of an operation.

A DynamicTensorSpec says which dimensions are one dynamic size (linked over several inputs), which buckets
stand for it and how a size finds its bucket; a ConstraintSpec derives a further dimension from the others; a
Probe makes the values of the inputs for a profile. A TuningConfig (specs.py) holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.buckets import checked_buckets
from moestro.tuning.spec.profiles import Initializer, OptimizationProfile, Shape

__all__ = ["NOT_A_TENSOR", "ConstraintSpec", "DynamicTensorSpec", "Probe", "Sizes"]

Sizes = tuple[int, ...]  # one size per dynamic spec; a bucket of a profile is one of these
NOT_A_TENSOR: Shape = (0,)  # the shape of an input that is none, as FlashInfer has it; known by identity


def _indices(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TuningError(f"{name} must be an integer or a sequence of integers, got {value!r}")
    return values


def itself(size: int) -> int:
    """The map of a specification without one: every size is its own bucket, as in TensorRT-LLM."""
    return size


@dataclass(frozen=True)
class DynamicTensorSpec:
    """One dynamic size: input_idx[i]'s dimension dim_idx[i] has it, for every i.

    gen_tuning_buckets: buckets, or a callable max_size -> buckets, evaluated with the size seen; left out, or ()
    without a map: that size alone. map_to_tuning_buckets: a size's bucket; must be monotone; by default the size itself.
    tensor_initializers: (shape, dtype, device) -> tensor, one per input_idx or None for random values.
    Indices may be plain integers where there is one.
    """

    input_idx: tuple[int, ...]
    dim_idx: tuple[int, ...]
    gen_tuning_buckets: tuple[int, ...] | Callable[[int], Iterable[int]]
    map_to_tuning_buckets: Callable[[int], int]
    tensor_initializers: tuple[Initializer | None, ...] | None = None

    def __init__(
        self,
        input_idx: int | Sequence[int],
        dim_idx: int | Sequence[int],
        gen_tuning_buckets: Iterable[int] | Callable[[int], Iterable[int]] | None = None,
        map_to_tuning_buckets: Callable[[int], int] = itself,
        tensor_initializers: Sequence[Initializer | None] | None = None,
    ) -> None:
        inputs, dims = _indices("input_idx", input_idx), _indices("dim_idx", dim_idx)
        if len(inputs) != len(dims):
            raise TuningError(
                f"input_idx and dim_idx must have one length, got {input_idx!r} and {dim_idx!r}"
            )
        if not callable(map_to_tuning_buckets):
            raise TuningError(f"map_to_tuning_buckets must be a callable, got {map_to_tuning_buckets!r}")
        if tensor_initializers is not None and len(tensor_initializers) != len(inputs):
            raise TuningError(
                f"tensor_initializers must be one per input_idx {inputs}, got {len(tensor_initializers)}"
            )
        buckets: Any = gen_tuning_buckets
        if buckets is None or (map_to_tuning_buckets is itself and buckets == ()):
            buckets = ()
        elif not callable(buckets):
            buckets = checked_buckets(buckets, "gen_tuning_buckets")
        object.__setattr__(self, "input_idx", inputs)
        object.__setattr__(self, "dim_idx", dims)
        object.__setattr__(self, "gen_tuning_buckets", buckets)
        object.__setattr__(self, "map_to_tuning_buckets", map_to_tuning_buckets)
        object.__setattr__(
            self, "tensor_initializers", None if tensor_initializers is None else tuple(tensor_initializers)
        )

    @property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """(input, dim) of every dimension that has this size."""
        return tuple(zip(self.input_idx, self.dim_idx, strict=True))

    def buckets(self, max_size: int) -> tuple[int, ...]:
        """The buckets up to the size seen, ascending. Raises TuningError for a generator that gives none."""
        if not callable(self.gen_tuning_buckets):
            return self.gen_tuning_buckets or (max_size,)
        return checked_buckets(self.gen_tuning_buckets(max_size), f"gen_tuning_buckets({max_size})")

    def bucket_of(self, size: int) -> int:
        """The map's answer for a size; at least 1. Raises TuningError if that is not an integer."""
        bucket = self.map_to_tuning_buckets(size)
        if isinstance(bucket, bool) or not hasattr(bucket, "__index__"):
            raise TuningError(f"map_to_tuning_buckets({size}) must be an integer, got {bucket!r}")
        return max(1, int(bucket))

    def size_in(self, shapes: Sequence[Shape]) -> int:
        """The size of these dimensions; inputs that are no tensors are left out.

        Raises TuningError where a dimension is not there, or linked ones differ.
        """
        try:
            linked = [shapes[i][d] for i, d in self.dims if shapes[i] is not NOT_A_TENSOR]
        except IndexError:
            linked = []
        if not linked:
            raise TuningError(
                f"input_idx {self.input_idx}, dim_idx {self.dim_idx}: not in inputs of shapes {shapes}"
            )
        if len(set(linked)) != 1:
            raise TuningError(
                f"linked dimensions must have one size: inputs {self.input_idx}, "
                f"dims {self.dim_idx} have {linked}"
            )
        return linked[0]


@dataclass(frozen=True)
class ConstraintSpec:
    """A dimension that follows from the others: infer_shape(shapes of all inputs) -> its size.

    On an input that is None it is left out.
    """

    input_idx: int
    dim_idx: int
    infer_shape: Callable[[Sequence[Shape]], int]

    def applies(self, shapes: Sequence[Shape]) -> bool:
        """Whether its input is there. Raises TuningError for an input or dimension out of range."""
        try:
            if shapes[self.input_idx] is NOT_A_TENSOR:
                return False
            shapes[self.input_idx][self.dim_idx]
        except IndexError:
            raise TuningError(
                f"ConstraintSpec(input_idx={self.input_idx}, dim_idx={self.dim_idx}): not in inputs of "
                f"shapes {shapes}"
            ) from None
        return True


@dataclass(frozen=True)
class Probe:
    """How inputs are made for a profile: make(inputs, profile, seed) -> inputs of the profile's shapes.

    `inputs` are already synthesised; make replaces the values that matter (for MoE, the routing). The name is
    part of the key of a decision.
    """

    name: str
    make: Callable[[Sequence[Any], OptimizationProfile, int], Sequence[Any]]

"""What may change between calls of an operation, and the shapes that it is measured at.

A DynamicTensorSpec says which dimensions are one dynamic size (linked over several inputs), which buckets
stand for it and how a size finds its bucket; a ConstraintSpec derives a further dimension from the others; a
Probe makes the values of the inputs for a profile. A TuningConfig holds them. A profile is the shapes of all
inputs with every dynamic size set to a bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.buckets import checked_buckets

__all__ = [
    "ConstraintSpec",
    "DynamicDim",
    "DynamicTensorSpec",
    "OptimizationProfile",
    "Probe",
    "StaticDim",
    "TuningConfig",
]

Shape = tuple[int, ...]
Sizes = tuple[int, ...]  # one size per dynamic spec; a bucket of a profile is one of these
Initializer = Callable[[Sequence[int], Any, Any], Any]  # (shape, dtype, device) -> tensor


def _indices(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TuningError(f"{name} must be an integer or a sequence of integers, got {value!r}")
    return values


@dataclass(frozen=True)
class DynamicTensorSpec:
    """One dynamic size: input_idx[i]'s dimension dim_idx[i] has it, for every i.

    gen_tuning_buckets: buckets, or a callable max_size -> buckets; evaluated with the size seen.
    map_to_tuning_buckets: a size's bucket; must be monotone. tensor_initializers: (shape, dtype, device) ->
    tensor, one per input_idx or None for random values. Indices may be plain integers where there is one.
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
        gen_tuning_buckets: Iterable[int] | Callable[[int], Iterable[int]],
        map_to_tuning_buckets: Callable[[int], int],
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
        buckets = gen_tuning_buckets
        if not callable(buckets):
            buckets = checked_buckets(buckets, "gen_tuning_buckets")
        object.__setattr__(self, "input_idx", inputs)
        object.__setattr__(self, "dim_idx", dims)
        object.__setattr__(self, "gen_tuning_buckets", buckets)
        object.__setattr__(self, "map_to_tuning_buckets", map_to_tuning_buckets)
        object.__setattr__(
            self, "tensor_initializers", None if tensor_initializers is None else tuple(tensor_initializers)
        )

    def buckets(self, max_size: int) -> tuple[int, ...]:
        """The buckets up to the size seen, ascending. Raises TuningError for a generator that gives none."""
        if not callable(self.gen_tuning_buckets):
            return self.gen_tuning_buckets
        return checked_buckets(self.gen_tuning_buckets(max_size), f"gen_tuning_buckets({max_size})")

    def bucket_of(self, size: int) -> int:
        """The map's answer for a size; at least 1. Raises TuningError if that is not an integer."""
        bucket = self.map_to_tuning_buckets(size)
        if isinstance(bucket, bool) or not hasattr(bucket, "__index__"):
            raise TuningError(f"map_to_tuning_buckets({size}) must be an integer, got {bucket!r}")
        return max(1, int(bucket))


@dataclass(frozen=True)
class ConstraintSpec:
    """A dimension that follows from the others: infer_shape(shapes of all inputs) -> its size."""

    input_idx: int
    dim_idx: int
    infer_shape: Callable[[Sequence[Shape]], int]


@dataclass(frozen=True)
class Probe:
    """How inputs are made for a profile: make(inputs, profile, seed) -> inputs of the profile's shapes.

    `inputs` are already synthesised; make replaces the values that matter (for MoE, the routing). The name is
    part of the key of a decision.
    """

    name: str
    make: Callable[[Sequence[Any], OptimizationProfile, int], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Everything about an operation that tuning needs, besides its runners.

    use_cuda_graph: serving replays a CUDA graph, so measure one. use_cold_l2_cache: None follows the policy.
    inputs_pre_hook(inputs) -> inputs: FlashInfer's way of making a single probe. probes: one or more; the
    objective over several is the smallest worst-case ratio to the default.
    """

    dynamic_tensor_specs: tuple[DynamicTensorSpec, ...] = ()
    constraint_specs: tuple[ConstraintSpec, ...] = ()
    use_cold_l2_cache: bool | None = None
    use_cuda_graph: bool = False
    inputs_pre_hook: Callable[[list[Any]], Sequence[Any]] | None = None
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dynamic_tensor_specs", "constraint_specs", "probes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = [probe.name for probe in self.probes]
        if len(set(names)) != len(names):
            raise TuningError(f"probes must have different names, got {names}")

    def sizes(self, shapes: Sequence[Shape]) -> Sizes:
        """The dynamic sizes of these shapes, one per spec. Raises TuningError if linked dimensions differ."""
        found = []
        for spec in self.dynamic_tensor_specs:
            try:
                linked = [shapes[i][d] for i, d in zip(spec.input_idx, spec.dim_idx, strict=True)]
            except IndexError:
                raise TuningError(
                    f"input_idx {spec.input_idx}, dim_idx {spec.dim_idx}: not in inputs of shapes {shapes}"
                ) from None
            if len(set(linked)) != 1:
                raise TuningError(
                    f"linked dimensions must have one size: inputs {spec.input_idx}, "
                    f"dims {spec.dim_idx} have {linked}"
                )
            found.append(linked[0])
        return tuple(found)

    def moving_dims(self) -> set[tuple[int, int]]:
        """(input, dim) of every dimension that is dynamic or follows from one."""
        dynamic = {
            (i, d)
            for spec in self.dynamic_tensor_specs
            for i, d in zip(spec.input_idx, spec.dim_idx, strict=True)
        }
        return dynamic | {(c.input_idx, c.dim_idx) for c in self.constraint_specs}

    def bucket_grid(self, sizes: Sizes) -> list[Sizes]:
        """Every combination of the buckets up to these sizes; [()] without a dynamic dimension."""
        pairs = zip(self.dynamic_tensor_specs, sizes, strict=True)
        return list(itertools.product(*(spec.buckets(max(1, size)) for spec, size in pairs)))

    def profile(self, shapes: Sequence[Shape], bucket: Sizes) -> OptimizationProfile:
        """The profile of inputs of these shapes at a bucket."""
        dims: list[list[Dim]] = [[StaticDim(size) for size in shape] for shape in shapes]
        initializers: list[Initializer | None] = [None] * len(dims)
        for spec, size in zip(self.dynamic_tensor_specs, bucket, strict=True):
            made = spec.tensor_initializers or (None,) * len(spec.input_idx)
            for i, d, initializer in zip(spec.input_idx, spec.dim_idx, made, strict=True):
                dims[i][d] = DynamicDim(size, size, size)
                initializers[i] = initializer or initializers[i]
        for constraint in self.constraint_specs:
            known = OptimizationProfile(dims, initializers).get_opt_shapes()
            size = int(constraint.infer_shape(known))
            dims[constraint.input_idx][constraint.dim_idx] = DynamicDim(size, size, size)
        return OptimizationProfile(dims, initializers)


@dataclass(frozen=True)
class StaticDim:
    """A dimension that never changes."""

    val: int

    @property
    def opt(self) -> int:
        return self.val


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that changes; `opt` is the size that is measured."""

    min: int
    opt: int
    max: int


Dim = StaticDim | DynamicDim


@dataclass
class OptimizationProfile:
    """The shapes of all inputs at one bucket; an input that is not a tensor has shape (0,)."""

    shapes: list[list[Dim]]
    tensor_initializers: list[Initializer | None]

    def get_opt_shapes(self) -> tuple[Shape, ...]:
        """The sizes that are measured."""
        return tuple(tuple(dim.opt for dim in shape) for shape in self.shapes)

    def get_hash_key(self) -> tuple[Shape, ...]:
        """What tells this profile from others."""
        return self.get_opt_shapes()

    def is_dynamic(self, index: int) -> bool:
        """Whether input `index` has a dimension that is set by the bucket."""
        return any(isinstance(dim, DynamicDim) for dim in self.shapes[index])

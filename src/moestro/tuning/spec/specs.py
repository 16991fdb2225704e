"""What may change between calls of an operation, and the shapes that it is measured at.

A DynamicTensorSpec says which dimensions are one dynamic size (linked over several inputs), which buckets stand for
it and how a size finds its bucket; a ConstraintSpec derives a further dimension from the others; a Probe makes the
values of the inputs. A TuningConfig holds them, and gives the OptimizationProfile of a bucket: the shapes of all
inputs, dimension by dimension, which a runner is asked for tactics with.

TuningConfig takes every keyword that FlashInfer's and TensorRT-LLM's operations give theirs. Some describe how their
measurement works and mean nothing to ours; each of those is named once a process, with the reason (NEEDLESS).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.spec.buckets import checked_buckets

__all__ = [
    "NEEDLESS",
    "NOT_A_TENSOR",
    "ConstraintSpec",
    "Dim",
    "DynamicDim",
    "DynamicTensorSpec",
    "Initializer",
    "OptimizationProfile",
    "Probe",
    "Shape",
    "Sizes",
    "StaticDim",
    "TuningConfig",
]

Shape = tuple[int, ...]
Initializer = Callable[[Sequence[int], Any, Any], Any]  # (shape, dtype, device) -> tensor
Sizes = tuple[int, ...]  # one size per dynamic spec; a bucket of a profile is one of these
NOT_A_TENSOR: Shape = (0,)  # the shape of an input that is none, as FlashInfer has it; known by identity
# keyword -> why it changes nothing here
NEEDLESS = {
    "value_aware_input_indices": "inputs are made once for each probe and are the same values for every "
    "candidate; give `probes` for several distributions",
    "profile_arena_input_indices": "all candidates run on the same tensors, and the timer itself takes care of "
    "what is in the cache",
    "cuda_graph_profile_replays": "the race samples each candidate until the choice is sure",
    "profiling_repeat": "the race samples each candidate until the choice is sure",
    "distributed_tuning_strategy": "who tunes is said where tuning starts: autotune(group=, strategy=)",
}
_said: set[str] = set()


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


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The settings of one operation. Raises TuningError for what makes no sense.

    tensor_initializers: ((input, initializer), ...) for dynamic inputs; others get random values.
    use_cuda_graph: serving replays a CUDA graph, so measure one. use_cold_l2_cache, use_cold_l2_graph_replay:
    whether what is read comes from memory; None follows the policy. inputs_pre_hook(inputs) -> inputs: a
    single probe without a name. probes: one or more; the objective over several is the smallest worst-case
    ratio to the default. tune_max_num_tokens: buckets end there, and larger sizes count as this one.
    accepts: names of other sets of probes, whose complete decisions serve beside this configuration's own and are not
    measured again. exclude_from_cache: decisions stay in this process. The others are taken and not needed (NEEDLESS).
    """

    dynamic_tensor_specs: tuple[DynamicTensorSpec, ...] = ()
    constraint_specs: tuple[ConstraintSpec, ...] = ()
    tensor_initializers: tuple[tuple[int, Initializer], ...] = ()
    use_cold_l2_cache: bool | None = None
    use_cuda_graph: bool = False
    inputs_pre_hook: Callable[[list[Any]], Sequence[Any]] | None = None
    probes: tuple[Probe, ...] = ()
    accepts: tuple[tuple[str, ...], ...] = ()
    tune_max_num_tokens: int | None = None
    exclude_from_cache: bool = False
    use_cold_l2_graph_replay: bool | None = None
    value_aware_input_indices: tuple[int, ...] = ()
    profile_arena_input_indices: tuple[int, ...] = ()
    cuda_graph_profile_replays: int | None = None
    profiling_repeat: int | None = None
    distributed_tuning_strategy: Any = None

    def __post_init__(self) -> None:
        for name in ("dynamic_tensor_specs", "constraint_specs", "probes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "tensor_initializers", _pairs(self.tensor_initializers))
        names = [probe.name for probe in self.probes]
        if len(set(names)) != len(names):
            raise TuningError(f"probes must have different names, got {names}")
        most = self.tune_max_num_tokens
        if most is not None and (isinstance(most, bool) or not hasattr(most, "__index__") or most < 1):
            raise TuningError(f"tune_max_num_tokens must be a positive integer or None, got {most!r}")
        if self.needless:
            _say(self.needless)

    @property
    def needless(self) -> list[str]:
        """The keywords that were given and mean nothing here."""
        return [f.name for f in fields(self) if f.name in NEEDLESS and getattr(self, f.name) != f.default]

    @property
    def cold(self) -> bool | None:
        """Whether what is read comes from memory; None follows the policy."""
        return self.use_cold_l2_graph_replay if self.use_cold_l2_cache is None else self.use_cold_l2_cache

    def sizes(self, shapes: Sequence[Shape]) -> Sizes:
        """The dynamic sizes of these shapes, one per spec, at most tune_max_num_tokens.

        Raises TuningError if linked dimensions differ, or a specification names what is not there.
        """
        for constraint in self.constraint_specs:
            constraint.applies(shapes)
        found = [spec.size_in(shapes) for spec in self.dynamic_tensor_specs]
        most = self.tune_max_num_tokens
        return tuple(found if most is None else [min(size, most) for size in found])

    def moving_dims(self) -> set[tuple[int, int]]:
        """(input, dim) of every dimension that is dynamic or follows from one."""
        dynamic = {place for spec in self.dynamic_tensor_specs for place in spec.dims}
        return dynamic | {(c.input_idx, c.dim_idx) for c in self.constraint_specs}

    def bucket_grid(self, sizes: Sizes) -> list[Sizes]:
        """Every combination of the buckets up to these sizes; [()] without a dynamic dimension."""
        return list(itertools.product(*map(self._buckets, self.dynamic_tensor_specs, sizes)))

    def _buckets(self, spec: DynamicTensorSpec, size: int) -> tuple[int, ...]:
        most = self.tune_max_num_tokens
        if most is None:
            return spec.buckets(max(1, size))
        return tuple(sorted({*[b for b in spec.buckets(most) if b <= most], min(max(1, size), most)}))

    def profile(self, shapes: Sequence[Shape], bucket: Sizes) -> OptimizationProfile:
        """The profile of inputs of these shapes at a bucket."""
        dims: list[list[Dim]] = [[StaticDim(size) for size in shape] for shape in shapes]
        initializers: list[Initializer | None] = [None] * len(dims)
        for spec, size in zip(self.dynamic_tensor_specs, bucket, strict=True):
            spec.size_in(shapes)  # or an error that names what is not there
            made = spec.tensor_initializers or (None,) * len(spec.input_idx)
            for (i, d), initializer in zip(spec.dims, made, strict=True):
                dims[i][d] = DynamicDim(size, size, size)
                initializers[i] = initializer or initializers[i]
        for i, initializer in self.tensor_initializers:
            if not -len(dims) <= i < len(dims):
                raise TuningError(f"tensor_initializers names input {i}, of {len(dims)} inputs")
            initializers[i] = initializer
        for constraint in self.constraint_specs:
            if constraint.applies(shapes):
                known = OptimizationProfile(dims, initializers).get_opt_shapes()
                size = int(constraint.infer_shape(known))
                dims[constraint.input_idx][constraint.dim_idx] = DynamicDim(size, size, size)
        return OptimizationProfile(dims, initializers)


def _pairs(given: Any) -> tuple[tuple[int, Initializer], ...]:
    """(input, initializer) pairs, of pairs or of a dictionary."""
    pairs = tuple(given.items() if isinstance(given, dict) else given or ())
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise TuningError(
                f"tensor_initializers must be pairs of an input's index and a callable, got {pair!r}"
            )
    return tuple((int(index), initializer) for index, initializer in pairs)


def _say(names: Sequence[str]) -> None:
    """Name each keyword that is not needed, once a process."""
    for name in names:
        if name not in _said:
            _said.add(name)
            warnings.warn(
                f"TuningConfig({name}=) is taken and not needed here: {NEEDLESS[name]}",
                TuningWarning,
                stacklevel=5,
            )

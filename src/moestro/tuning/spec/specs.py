"""What may change between calls of an operation, and the shapes that it is measured at: a TuningConfig.

It takes every keyword that FlashInfer's and TensorRT-LLM's operations give theirs. Some describe how their
measurement works and mean nothing to ours; each of those is named once a process, with the reason (NEEDLESS).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.spec.dynamic import NOT_A_TENSOR, ConstraintSpec, DynamicTensorSpec, Probe, Sizes
from moestro.tuning.spec.profiles import Dim, DynamicDim, Initializer, OptimizationProfile, Shape, StaticDim

__all__ = [
    "NEEDLESS",
    "NOT_A_TENSOR",
    "ConstraintSpec",
    "DynamicDim",
    "DynamicTensorSpec",
    "OptimizationProfile",
    "Probe",
    "Shape",
    "Sizes",
    "StaticDim",
    "TuningConfig",
]

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

"""Their way to name what was tuned: the shapes of all inputs with sizes replaced by buckets.

Pure functions of shapes and a TuningConfig. Our own keys hold more (dtypes, static shapes, the runner's whole
configuration); these stand beside them for what callers look up, seed or save by their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey, shapes_of
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.spec.runner import runner_identity
from moestro.tuning.spec.specs import DynamicDim, OptimizationProfile, Shape, TuningConfig
from moestro.tuning.spec.tactic_list import class_name

__all__ = ["ProfilingCacheKey", "cache_key", "key_of_record", "nearest_profile", "optimization_profiles"]

WILDCARD = -1  # of a dimension that follows from others


@dataclass(frozen=True)
class ProfilingCacheKey:
    """One operation, runner and nearest profile, with the runner's extras."""

    custom_op: str
    runner_class_name: str
    runner_hash: int
    nearest_profile: tuple[Shape, ...]
    extras: tuple[Any, ...] = ()

    @property
    def file_key(self) -> str:
        """The name of an entry in a file: everything but the hash, which other processes do not know."""
        return str((self.custom_op, self.runner_class_name, self.nearest_profile, self.extras))


def nearest_profile(shapes: Sequence[Sequence[int]], config: TuningConfig) -> tuple[Shape, ...]:
    """The shapes with every dynamic size mapped to its bucket, and -1 where a constraint gives the size."""
    found = [list(shape) for shape in shapes]
    most = config.tune_max_num_tokens
    for spec in config.dynamic_tensor_specs:
        (first, dim), *_ = spec.dims
        bucket = spec.map_to_tuning_buckets(found[first][dim])
        for i, d in spec.dims:
            found[i][d] = bucket if most is None else min(bucket, most)
    for constraint in config.constraint_specs:
        if len(found[constraint.input_idx]) > constraint.dim_idx:
            found[constraint.input_idx][constraint.dim_idx] = WILDCARD
    return tuple(map(tuple, found))


def cache_key(
    op: str,
    runner: Any,
    shapes: Sequence[Sequence[int]],
    config: TuningConfig,
    extras: tuple[Any, ...] = (),
) -> ProfilingCacheKey:
    """The key of a runner for these shapes. Runners of one class and configuration have one."""
    number = int(digest(runner_identity(runner)), 16)
    return ProfilingCacheKey(op, type(runner).__name__, number, nearest_profile(shapes, config), extras)


def optimization_profiles(
    config: TuningConfig, inputs: Sequence[Any], *, with_size: bool = False
) -> list[OptimizationProfile]:
    """The profile of every combination of buckets, each dimension with the next bucket as its upper end.

    with_size: the bucket of the size seen is one as well (TensorRT-LLM's rule).
    """
    shapes = shapes_of(inputs)
    sizes = config.sizes(shapes)
    grid = [sorted({bucket[d] for bucket in config.bucket_grid(sizes)}) for d in range(len(sizes))]
    if with_size:
        own = [s.bucket_of(size) for s, size in zip(config.dynamic_tensor_specs, sizes, strict=True)]
        grid = [sorted({*buckets, bucket}) for buckets, bucket in zip(grid, own, strict=True)]
    return [_with_ends(config, shapes, bucket, grid) for bucket in itertools.product(*grid)]


def _with_ends(
    config: TuningConfig, shapes: Sequence[Shape], bucket: tuple[int, ...], grid: Sequence[Sequence[int]]
) -> OptimizationProfile:
    profile = config.profile(shapes, bucket)
    for spec, size, buckets in zip(config.dynamic_tensor_specs, bucket, grid, strict=True):
        end = next((b for b in buckets if b > size), float("inf"))
        for i, d in spec.dims:
            profile.shapes[i][d] = DynamicDim(size, size, end)
    return profile


def key_of_record(key: StaticKey, record: Record) -> ProfilingCacheKey:
    """Their key of one of our decisions: moving dimensions have the bucket's size."""
    return ProfilingCacheKey(
        key.op,
        class_name(record.runner),
        int(digest(dict(key.fields["runners"][key.runners.index(record.runner)])), 16),
        tuple(_filled(key.fields["inputs"], record.bucket)),
    )


def _filled(inputs: Sequence[Any], bucket: tuple[int, ...]) -> Iterator[Shape]:
    for described in inputs:
        shape = described.get("shape", [0])
        if len(bucket) == 1:
            yield tuple(bucket[0] if size is None else size for size in shape)
        else:
            left = iter(bucket)
            yield tuple(next(left, WILDCARD) if size is None else size for size in shape)

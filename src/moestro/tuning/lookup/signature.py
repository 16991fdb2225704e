"""What runners and a configuration are made of, to find a call site without the objects themselves.

FlashInfer's operations make their runners, the classes of these and their configurations anew in every call.
Two of them have one signature if their classes have one name, their plain attributes are equal and their
functions are one code with equal closures. It need not be exact for runners: what a key depends on is asked
again by the guards. It is for configurations, whose functions decide buckets; what cannot be compared there
counts by its identity, and the site keeps it alive.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Sequence
from typing import Any

from moestro.tuning.spec.plain_json import TEXT_TYPES
from moestro.tuning.spec.specs import TuningConfig

__all__ = ["signature_of"]

PLAIN = {int, str, bool, float, bytes, type(None)}


def signature_of(runners: Sequence[Any], config: TuningConfig) -> tuple[Any, ...]:
    """Hashable; equal for what serves the same."""
    return (*map(_of_runner, runners), _of_config(config))


def _of_runner(runner: Any) -> tuple[Any, ...]:
    kind = type(runner)
    found = getattr(runner, "__dict__", None)
    if not found:
        return (kind.__module__, kind.__qualname__, () if found is not None else id(runner))
    values = [
        _plain(value) for name, value in found.items() if name[0] != "_" and not name.endswith("_cache")
    ]
    return (kind.__module__, kind.__qualname__, tuple(values))


def _of_config(config: TuningConfig) -> tuple[Any, ...]:
    parts: list[Any] = []
    for spec in config.dynamic_tensor_specs:
        parts += (spec.input_idx, spec.dim_idx, _of(spec.gen_tuning_buckets), _of(spec.map_to_tuning_buckets))
        parts += map(_of, spec.tensor_initializers or ())
    for constraint in config.constraint_specs:
        parts += (constraint.input_idx, constraint.dim_idx, _of(constraint.infer_shape))
    for index, initializer in config.tensor_initializers:
        parts += (index, _of(initializer))
    for probe in config.probes:
        parts += (probe.name, _of(probe.make))
    parts += (
        config.accepts,
        config.use_cold_l2_cache,
        config.use_cold_l2_graph_replay,
        config.use_cuda_graph,
        config.tune_max_num_tokens,
        config.exclude_from_cache,
        _of(config.inputs_pre_hook),
    )
    return (type(config), *parts)


def _of(value: Any) -> Any:
    """A function by its code, closure and defaults; a method and a partial by theirs; else a plain value."""
    if isinstance(value, types.FunctionType):
        cells = value.__closure__
        return (
            id(value.__code__),
            id(value.__globals__),
            tuple([_of_cell(cell) for cell in cells]) if cells else None,
            tuple(map(_plain, value.__defaults__)) if value.__defaults__ else None,
            tuple(_plain(v) for v in value.__kwdefaults__.values()) if value.__kwdefaults__ else None,
        )
    if isinstance(value, types.MethodType):
        return (id(value.__self__), _of(value.__func__))
    if isinstance(value, functools.partial):
        keywords = tuple((k, _of(v)) for k, v in value.keywords.items())
        return (_of(value.func), tuple(map(_of, value.args)), keywords)
    return _plain(value)


def _of_cell(cell: Any) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:
        return None  # not bound yet
    # A function that calls itself would have no end: by identity.
    return id(value) if isinstance(value, types.FunctionType) else _plain(value)


def _plain(value: Any) -> Any:
    """A value that may be kept and compared as it is; of anything else (a tensor, a handle) who it is."""
    kind = type(value)
    if kind in PLAIN:
        return (kind, value)
    if kind is tuple:
        return tuple([_plain(inner) for inner in value])
    params = getattr(kind, "__dataclass_params__", None)
    if (params is not None and params.frozen) or isinstance(value, enum.Enum) or kind.__name__ in TEXT_TYPES:
        try:
            return (kind.__qualname__, hash(value), value)
        except TypeError:
            pass
    return (kind.__qualname__, id(value))

"""Has anything changed that a key depends on? Asked on every call, so answered without building the key.

A guard is made from the inputs and runners of a call whose key is known, and tells whether a later call would
have the same key. It may say no without need (the key is then built again) but never yes wrongly. Of twelve
torch tensors, shape, dtype and device cost 4.4 µs to read from Python on this project's CPU; the check that
torch.compile guards its code with reads them in C++ in 0.6 µs, and is used where torch has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from moestro.tuning.spec.keys import is_tensor, is_torch
from moestro.tuning.spec.plain_json import to_json
from moestro.tuning.spec.runner import (
    TunableRunner,
    configuration,
    kind_of,
    own_id,
    public_attributes,
    runner_objects,
)
from moestro.tuning.spec.specs import TuningConfig

__all__ = ["Guard", "make_guard"]

PLAIN = (type(None), bool, int, float, str)


Guard = Callable[
    [Sequence[Any], Sequence[Any], Mapping[str, Any]], bool
]  # (runners, inputs, kwargs) -> same key?


def make_guard(
    runners: Sequence[Any], config: TuningConfig, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> Guard | None:
    """A guard for the key of this call; None if only building the key could tell."""
    if not all(isinstance(value, PLAIN) for value in kwargs.values()):
        return None
    same_inputs = _inputs_guard(config, inputs)
    if same_inputs is None:
        return None
    same_runner = [_runner_guard(runner) for runner in runners]
    first, others = same_runner[0], list(enumerate(same_runner))[1:]
    base = TunableRunner.get_cache_key_extras
    extras = [
        (index, runner.get_cache_key_extras(inputs))
        for index, runner in enumerate(runners)
        if getattr(type(runner), "get_cache_key_extras", base) is not base
    ]
    plain = [(name, type(value), value) for name, value in kwargs.items()]
    count = len(inputs)
    if len(runners) == 1 and not extras and not plain and all(map(is_tensor, inputs)):
        same_tensors = _tensor_guard(config, inputs, list(range(count)))
        # The usual call, in one frame: 0.3 µs less than through the general guard below.
        return lambda runners, inputs, kwargs: (
            len(inputs) == count and same_tensors(*inputs) and first(runners[0]) and not kwargs
        )

    def holds(runners: Sequence[Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if not first(runners[0]) or not same_inputs(inputs):
            return False
        for index, same in others:
            if not same(runners[index]):
                return False
        if (kwargs or plain) and not _same_kwargs(kwargs, plain):
            return False
        return not extras or all(
            runners[index].get_cache_key_extras(inputs) == known for index, known in extras
        )

    return holds


def _same_kwargs(kwargs: Mapping[str, Any], plain: list[tuple[str, type, Any]]) -> bool:
    if len(kwargs) != len(plain):
        return False
    return all(type(kwargs.get(name)) is kind and kwargs[name] == value for name, kind, value in plain)


def _runner_guard(runner: Any) -> Callable[[Any], bool]:
    """Whether a runner's configuration is what it is now; private attributes may change but not come or go.

    Plain values are compared as such; immutable ones by identity, else by their JSON; those that have no value
    by identity, and without being kept alive.
    """
    public = public_attributes(runner)
    attributes = getattr(runner, "__dict__", None)
    written, odd = _written(runner)
    unlike = attributes is None or any(name not in attributes for name in public)
    mutable = not all(_immutable(value) for name, value in public.items() if name not in odd)
    if unlike or mutable or own_id(runner) is not None:
        numbers = runner_objects(runner)
        return lambda now: bool(_written(now)[0] == written and runner_objects(now) == numbers)
    count = len(attributes or ())
    atoms = [name for name in public if type(public[name]) in PLAIN]
    get = itemgetter(*atoms) if atoms else (lambda attributes: None)
    values = get(vars(runner))
    checks = [
        (name, _reference(value) if name in odd else value, name in odd, written.get(name))
        for name, value in public.items()
        if type(value) not in PLAIN
    ]

    if not checks:  # one frame less, and no loop
        return lambda now: len(found := now.__dict__) == count and bool(get(found) == values)

    def same(now: Any) -> bool:
        found = now.__dict__
        if len(found) != count or get(found) != values:
            return False
        for name, value, is_odd, text in checks:
            if is_odd:
                if value() is not found[name]:
                    return False
            elif found[name] is not value and not _same_json(found[name], text):
                return False
        return True

    return same


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _same_json(value: Any, text: Any) -> bool:
    try:
        return bool(to_json(value) == text)
    except (TypeError, RecursionError):
        return False


def _written(runner: Any) -> tuple[dict[str, Any], set[str]]:
    """(the JSON of a runner's configuration, the attributes of it that have no value)."""
    written: dict[str, Any] = {}
    odd = set()
    for name, value in configuration(runner).items():
        try:
            written[name] = to_json(value)
        except (TypeError, RecursionError):
            odd.add(name)
            written[name] = kind_of(value)
    return written, odd


def _immutable(value: Any) -> bool:
    """Whether the same object always has the same JSON."""
    if isinstance(value, tuple | frozenset):
        return all(map(_immutable, value))
    if isinstance(value, list | dict | set):
        return False
    params = getattr(type(value), "__dataclass_params__", None)
    if params is not None:
        return bool(params.frozen) and all(
            _immutable(getattr(value, name)) for name in value.__dataclass_fields__
        )
    return True


def _inputs_guard(config: TuningConfig, inputs: Sequence[Any]) -> Callable[[Sequence[Any]], bool] | None:
    tensors = [i for i, value in enumerate(inputs) if is_tensor(value)]
    others = [i for i, value in enumerate(inputs) if not is_tensor(value)]
    if not all(isinstance(inputs[i], PLAIN) for i in others):
        return None
    same_tensors = _tensor_guard(config, inputs, tensors)
    count = len(inputs)
    if not others:
        return lambda now: len(now) == count and same_tensors(*now)
    plain = [(i, type(inputs[i]), inputs[i]) for i in others]

    def same(now: Sequence[Any]) -> bool:
        if len(now) != count:
            return False
        for i, kind, value in plain:
            if type(now[i]) is not kind or now[i] != value:
                return False
        return same_tensors(*[now[i] for i in tensors])

    return same


def _tensor_guard(config: TuningConfig, inputs: Sequence[Any], tensors: list[int]) -> Callable[..., bool]:
    """Takes the tensors; whether dtypes, devices and static sizes are what they are now."""
    moving = config.moving_dims()
    open_shapes = []
    for i in tensors:
        rank = len(inputs[i].shape)
        free = {d % rank for index, d in moving if index == i and rank}
        open_shapes.append([None if d in free else int(n) for d, n in enumerate(inputs[i].shape)])
    values = [inputs[i] for i in tensors]
    return _compiled_guard(values, open_shapes) or _plain_guard(values, open_shapes)


def _compiled_guard(values: list[Any], open_shapes: list[Any]) -> Callable[..., bool] | None:
    if not values or not all(map(is_torch, values)) or len({id(v) for v in values}) != len(values):
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards

        free_strides = [[None] * len(shape) for shape in open_shapes]
        guard = TensorGuards(*values, dynamic_dims_sizes=open_shapes, dynamic_dims_strides=free_strides)  # type: ignore[arg-type]
        check: Callable[..., bool] = guard.check
        return check if check(*values) else None
    except Exception:
        return None  # not in this torch, or not for these tensors


def _plain_guard(values: list[Any], open_shapes: list[Any]) -> Callable[..., bool]:
    facts = [
        (value.dtype, getattr(value, "device", None), shape)
        for value, shape in zip(values, open_shapes, strict=True)
    ]

    def check(*now: Any) -> bool:
        for value, (dtype, device, shape) in zip(now, facts, strict=True):
            if not is_tensor(value):
                return False
            found = value.shape
            if value.dtype != dtype or getattr(value, "device", None) != device or len(found) != len(shape):
                return False
            for size, expected in zip(found, shape, strict=True):
                if expected is not None and size != expected:
                    return False
        return True

    return check

"""What tells one set of decisions from another: everything that a decision depends on but the dynamic sizes.

A static key has the op, every runner's identity in order (the first one's tactic -1 is the default), dtypes,
shapes with the moving dimensions left open, the device type, graph or eager, the runners' extras and the
keyword arguments that are plain values. The probes are part of each record (decisions.py): serving has none,
tuning may have others. Inputs only need .shape and .dtype (and .device): no torch here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.plain_json import digest, to_json
from moestro.tuning.spec.runner import identity_text, kind_of, runner_identity, runner_objects
from moestro.tuning.spec.specs import NOT_A_TENSOR, Shape, TuningConfig

__all__ = ["StaticKey", "device_of", "is_tensor", "is_torch", "shapes_of", "static_key"]


@dataclass(frozen=True)
class StaticKey:
    """The key of one set of decisions. `fields` is readable JSON; `text` names it in a file system."""

    op: str
    text: str  # digest of the fields
    # Identities in short, in order; the first one's default tactic is the default. Of two equal ones the second
    # is "name~2".
    runners: tuple[str, ...]
    fields: Mapping[str, Any]
    objects: tuple[tuple[int, ...], ...] = ()  # by runner: what only this process can tell apart

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], objects: tuple[tuple[int, ...], ...] = ()) -> StaticKey:
        """The key with these fields, as written in a store. Raises KeyError or TypeError for what is none."""
        names = _different([identity_text(identity) for identity in fields["runners"]])
        return cls(str(fields["op"]), digest(fields), names, fields, objects)

    @functools.cached_property
    def family(self) -> str:
        """A digest of everything but the runners: keys of one family differ in who takes part."""
        return digest({k: v for k, v in self.fields.items() if k not in {"runners", "extras"}})

    def participants(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Runner -> (extras, objects): what a decision for it depends on besides the family."""
        extras = self.fields.get("extras") or [None] * len(self.runners)
        objects = self.objects or ((),) * len(self.runners)
        return {name: (e, o) for name, e, o in zip(self.runners, extras, objects, strict=False)}

    def __hash__(self) -> int:
        return hash((self.op, self.text, self.objects))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticKey) and (self.op, self.text, self.objects) == (
            other.op,
            other.text,
            other.objects,
        )


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """The names, of which the second equal one gets "~2" and so on."""
    return tuple(
        name if not (before := names[:i].count(name)) else f"{name}~{before + 1}"
        for i, name in enumerate(names)
    )


def is_tensor(value: Any) -> bool:
    """Whether an input has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_torch(value: Any) -> bool:
    """Whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shapes_of(inputs: Sequence[Any]) -> tuple[Shape, ...]:
    """The shapes of the inputs; (0,) for what is not a tensor, as FlashInfer has it."""
    return tuple(tuple(x.shape) if is_tensor(x) else NOT_A_TENSOR for x in inputs)


def device_of(inputs: Sequence[Any]) -> str:
    """The device of the first input that has one, such as "cuda:0"; "cpu" if none has."""
    for value in inputs:
        if is_tensor(value) and getattr(value, "device", None) is not None:
            return str(value.device)
    return "cpu"


def static_key(
    op: str,
    runners: Sequence[Any],
    config: TuningConfig,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> StaticKey:
    """The key for these inputs."""
    if not isinstance(op, str) or not op:
        raise TuningError(f"op must be a non-empty string, got {op!r}")
    identities = [runner_identity(runner) for runner in runners]
    moving = config.moving_dims()
    fields = {
        "op": op,
        "runners": identities,
        "inputs": [_describe(i, value, moving) for i, value in enumerate(inputs)],
        "device": device_of(inputs).partition(":")[0],
        "mode": "graph" if config.use_cuda_graph else "eager",
        "extras": [_extras(runner, inputs) for runner in runners],
        "kwargs": {name: _plain(value) for name, value in sorted(kwargs.items())},
    }
    objects = tuple(map(runner_objects, runners))
    return StaticKey.from_fields(fields, objects if any(objects) else ())


def _describe(index: int, value: Any, moving: set[tuple[int, int]]) -> Any:
    if not is_tensor(value):
        return {"value": _plain(value)}
    rank = len(value.shape)
    open_dims = {d % rank for i, d in moving if i == index and rank}
    shape = [None if d in open_dims else int(size) for d, size in enumerate(value.shape)]
    return {"shape": shape, "dtype": str(value.dtype)}


def _plain(value: Any) -> Any:
    """A plain value as it is; of a tensor or an object only what kind it is."""
    if is_tensor(value):
        return {"tensor": str(value.dtype)}
    try:
        return to_json(value)
    except TypeError:
        return {"kind": kind_of(value)}


def _extras(runner: Any, inputs: Sequence[Any]) -> Any:
    hook = getattr(runner, "get_cache_key_extras", None)
    if hook is None:
        return []
    extras = hook(inputs)
    try:
        return to_json(tuple(extras))
    except TypeError as error:
        raise TuningError(
            f"get_cache_key_extras of runner {type(runner).__qualname__} must give plain values: {error}"
        ) from None

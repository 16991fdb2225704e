"""A runner: one implementation of an operation, which offers tactics and runs any of them; and what it is
called.

A runner's identity is its class and its public configuration: the attributes whose names neither begin with
`_` nor end in `_cache`. Two runners of one identity are the same to the tuner, in this process and in any
other. An attribute may also hold what has no value (a tensor, a handle): it counts by its object in this
process and by its class elsewhere.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.spec.plain_json import digest, from_json, to_json

__all__ = [
    "TunableRunner",
    "check_runners",
    "configuration",
    "identity_text",
    "kind_of",
    "own_id",
    "public_attributes",
    "runner_identity",
    "runner_objects",
    "stored_tactic",
    "tactic_from_json",
    "tactic_key",
    "valid_tactics",
]

DEFAULT_TACTIC = -1
PLAIN = {type(None), bool, int, float, str}


class TunableRunner(ABC):
    """One implementation of an operation. Written as for FlashInfer or TensorRT-LLM; such runners run
    unchanged.

    Hooks that a runner may also have: reserve(inputs, tactics) allocates outputs and workspaces for the
    largest candidate before any timing; compile(inputs, tactic) compiles without timing and is called from
    several threads; compile_jobs(inputs, tactic) -> the same as {key: job}, where equal keys are one job, so
    that what many tactics share is compiled once; tolerance(inputs) -> the relative error norm allowed against
    the default tactic; last_resort(inputs) -> whether it is only raced where no other runner runs;
    kernel_sources() -> paths of the files that decide its speed, a class method where it can be one; without it,
    the file that its class is written in.
    """

    @abstractmethod
    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> Sequence[Any]:
        """The tactics that can run these inputs; -1, the default tactic, is always one and need not be
        listed.
        """

    @abstractmethod
    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        """Run `tactic`; -1 must run for every valid input. do_preparation: only what precedes measuring."""

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What else a decision depends on."""
        return ()

    def __call__(self, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return self.forward(inputs, **kwargs)


def public_attributes(runner: Any) -> dict[str, Any]:
    """The attributes that are a runner's configuration."""
    values = dict(getattr(runner, "__dict__", {}))
    for cls in type(runner).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(runner, name):
                values[name] = getattr(runner, name)
    return {k: v for k, v in values.items() if not k.startswith("_") and not k.endswith("_cache")}


def runner_identity(runner: Any) -> dict[str, Any]:
    """{"class": ..., "config": {...}} as JSON.

    An attribute without a value that could be compared (a tensor, a module, a handle, a lambda) is written as
    its class, with one warning that names it; `runner_objects` tells such objects apart in this process. A
    runner that has TensorRT-LLM's unique_id() is configured by that alone.
    """
    name = f"{type(runner).__module__}.{type(runner).__qualname__}"
    return {"class": name, "config": {k: _written(v, name, k) for k, v in configuration(runner).items()}}


def configuration(runner: Any) -> dict[str, Any]:
    """What a runner's identity is made of, by name, in order."""
    unique_id = own_id(runner)
    if unique_id is not None:
        return {"unique_id": unique_id()}
    return dict(sorted(public_attributes(runner).items()))


def own_id(runner: Any) -> Any:
    """The runner's own unique_id(), as TensorRT-LLM's have it; None where it has none."""
    method = getattr(runner, "unique_id", None)
    return method if callable(method) and not getattr(method, "is_default", False) else None


def _written(value: Any, name: str, attribute: str) -> Any:
    try:
        return to_json(value)
    except (TypeError, RecursionError):
        pass
    if (name, attribute) not in _named:
        _named.add((name, attribute))
        warnings.warn(
            f"attribute {attribute!r} of runner {name} has no value that another process could compare: "
            f"decisions tell its objects apart in this process, and only {kind_of(value)} on disk. Give "
            "get_cache_key_extras() what decisions depend on; if none does, call it "
            f"_{attribute}",
            TuningWarning,
            stacklevel=6,
        )
    try:
        return to_json(value, other=lambda inner: {"kind": kind_of(inner)})
    except RecursionError:
        return {"kind": kind_of(value)}


def runner_objects(runner: Any) -> tuple[int, ...]:
    """Numbers for the objects without a value in a runner's configuration: the same object, the same number."""
    found: list[int] = []

    def note(value: Any) -> None:
        found.append(_number_of(value))

    for value in configuration(runner).values():
        if type(value) in PLAIN:
            continue
        try:
            to_json(value, other=note)
        except RecursionError:
            note(value)
    return tuple(found)


def kind_of(value: Any) -> str:
    """The name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


_named: set[tuple[str, str]] = set()  # (class, attribute) that a warning has named
_numbers: dict[int, tuple[Any, int]] = {}  # id -> (weak reference, number)
_count = itertools.count(1)


def _number_of(value: Any) -> int:
    """A number for an object as long as it lives; its address for one that takes no weak references."""
    key = id(value)
    known = _numbers.get(key)
    if known is not None and known[0]() is value:
        return known[1]
    try:
        reference = weakref.ref(value, lambda _: _numbers.pop(key, None))
    except TypeError:
        return -key
    number = next(_count)
    _numbers[key] = (reference, number)
    return number


def identity_text(identity: dict[str, Any]) -> str:
    """A short name for an identity: its class, and a digest of its configuration if it has any."""
    return (
        f"{identity['class']}#{digest(identity['config'])}" if identity["config"] else str(identity["class"])
    )


def check_runners(runners: Sequence[Any]) -> None:
    """Raise TuningError unless this is a non-empty sequence of runners."""
    if not isinstance(runners, list | tuple) or not runners:
        raise TuningError(f"runners must be a list with at least one runner, got {runners!r}")
    for runner in runners:
        if isinstance(runner, type):
            raise TuningError(f"runners must be objects, got the class {runner.__name__}")
        for method in ("forward", "get_valid_tactics"):
            if not callable(getattr(runner, method, None)):
                raise TuningError(f"runners must have a method {method}(), got {runner!r}")


def valid_tactics(
    runner: Any, inputs: Sequence[Any], profile: Any, kwargs: Mapping[str, Any]
) -> Sequence[Any]:
    """What a runner offers for these inputs. It gets the keyword arguments that it takes, as TensorRT-LLM's do."""
    taken = accepted(runner.get_valid_tactics, kwargs) if kwargs else {}
    offered = runner.get_valid_tactics(inputs, profile, **taken)
    return () if offered is None else list(offered)


def accepted(method: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a method takes."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(kwargs)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in kwargs.items() if name in names}


def tactic_key(tactic: Any, runner: Any) -> Any:
    """The JSON of a tactic, by which candidates are told apart; lists count as tuples.

    Raises TuningError naming the runner for one that could not be read back from a store.
    """
    if tactic is DEFAULT_TACTIC or type(tactic) is int:
        return tactic
    try:
        key = to_json(_frozen(tactic))
        back = to_json(_frozen(from_json(key)))
    except (TypeError, RecursionError, TuningError) as error:
        raise _no_tactic(tactic, runner, str(error)) from None
    if back != key:
        raise _no_tactic(tactic, runner, "it would come back as another value")
    return key


def _no_tactic(tactic: Any, runner: Any, why: str) -> TuningError:
    return TuningError(
        f"a tactic of runner {type(runner).__qualname__} must be serialisable (int, str, bytes, path, torch "
        f"dtype, tuple, list or dict of those, dataclass or named tuple of a module), got {tactic!r}: {why}"
    )


def stored_tactic(tactic: Any) -> Any:
    """A tactic as records keep it: as it was given, but foreign sequences (arrays of a C++ binding) as tuples."""
    if type(tactic) in {list, tuple}:
        return type(tactic)(map(stored_tactic, tactic))
    if type(tactic) is dict:
        return {key: stored_tactic(value) for key, value in tactic.items()}
    return tuple(map(stored_tactic, tactic)) if _is_foreign(tactic) else tactic


def _frozen(tactic: Any) -> Any:
    if type(tactic) in {list, tuple} or _is_foreign(tactic):
        return tuple(_frozen(v) for v in tactic)
    if type(tactic) is dict:
        return {key: _frozen(value) for key, value in tactic.items()}
    return tactic


def _is_foreign(value: Any) -> bool:
    """Whether this is a sequence of another library, which JSON and other processes only know as its items."""
    plain = isinstance(value, str | bytes | dict | list | tuple | set | frozenset | type)
    sized = hasattr(type(value), "__iter__") and hasattr(type(value), "__len__")
    return not plain and sized and not hasattr(value, "shape") and not hasattr(value, "__dataclass_fields__")


def tactic_from_json(value: Any) -> Any:
    """The tactic that a record was written with. Raises TuningError for what cannot be made again here."""
    return from_json(value)

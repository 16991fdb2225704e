"""A runner: one implementation of an operation, which offers tactics and runs any of them; and what it is
called.

A runner's identity is its class and its public configuration: the attributes whose names neither begin with
`_` nor end in `_cache`. Two runners of one identity are the same to the tuner, in this process and in any
other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.plain_json import digest, from_json, to_json

__all__ = [
    "TunableRunner",
    "check_runners",
    "runner_identity",
    "tactic_from_json",
    "tactic_key",
]

DEFAULT_TACTIC = -1


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
    """{"class": ..., "config": {...}} as JSON. Raises TuningError naming an attribute that cannot be
    serialised.
    """
    name = f"{type(runner).__module__}.{type(runner).__qualname__}"
    config = {}
    for attribute, value in sorted(public_attributes(runner).items()):
        try:
            config[attribute] = to_json(value)
        except TypeError as error:
            raise TuningError(
                f"attribute {attribute!r} of runner {name} cannot be part of a tuning key: {error}. "
                f"If no decision depends on it, call it _{attribute}"
            ) from None
    return {"class": name, "config": config}


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
        for method in ("forward", "get_valid_tactics"):
            if not callable(getattr(runner, method, None)):
                raise TuningError(f"runners must have a method {method}(), got {runner!r}")


def tactic_key(tactic: Any, runner: Any) -> Any:
    """The JSON of a tactic. Raises TuningError naming the runner for one that is not hashable and
    serialisable.

    Lists count as tuples, as FlashInfer's runners give them.
    """
    try:
        key = to_json(_frozen(tactic))
        hash(_frozen(tactic))
    except TypeError as error:
        raise TuningError(
            f"a tactic of runner {type(runner).__qualname__} must be hashable and serialisable "
            f"(int, str, tuple of those, frozen dataclass), got {tactic!r}: {error}"
        ) from None
    return key


def _frozen(tactic: Any) -> Any:
    return tuple(_frozen(v) for v in tactic) if type(tactic) in {list, tuple} else tactic


def tactic_from_json(value: Any) -> Any:
    """The tactic that tactic_key wrote; lists come back as tuples."""
    return from_json(value)

"""What an `autotune(...)` context says, and for whom.

A context counts for the thread, and in asyncio for the task, that entered it, and for the tasks that were begun
inside it, until it is left. Contexts nest: an inner one inherits what it does not set, adds to the skipped ops,
and is gone when it is left. A thread without a context never tunes, nor does a child that was forked inside one:
it would write into its parent's store, beside it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.errors import TuningError, as_flag, as_optional
from moestro.tuning.group import Group
from moestro.tuning.measure.budget import Budget
from moestro.tuning.progress import Progress, as_progress
from moestro.tuning.spec.buckets import checked_buckets, make_bucket_mapper
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.specs import DynamicTensorSpec, Probe, TuningConfig
from moestro.tuning.store.store import Store

__all__ = ["Contexts", "Options"]

FLAGS = {  # fields that are switches, by the names that callers know
    "tune": "tune_mode",
    "round_up": "round_up",
    "crossover": "crossover",
    "only_sizes_seen": "only_sizes_seen",
    "ahead": "ahead",
}


@dataclass(frozen=True)
class Options:
    """What the contexts around a call say together."""

    tune: bool = True
    store: Store | None = None
    budget: Budget = field(default_factory=lambda: Budget(None))
    buckets: tuple[int, ...] | None = None
    round_up: bool | None = None
    skip_ops: frozenset[str] = frozenset()
    policy: MeasurementPolicy | None = None
    probes: tuple[Probe, ...] | None = None
    progress: Progress = False
    crossover: bool = True
    group: Group | None = None  # ranks that decide together
    only_sizes_seen: bool = False  # no buckets besides the sizes of calls
    ahead: bool = False  # no call is waiting: no size may take what all others need
    answers: Any = None  # testing.TacticsCapture or Replay: who notes or answers the choices made inside

    def inner(self, *, skip_ops: Iterable[str] | str | None, **given: Any) -> Options:
        """The options of a context inside this one. Raises TuningError for a value of another type, naming it."""
        for name in FLAGS:
            if given.get(name) is not None:
                given[name] = as_flag(FLAGS[name], given[name], TuningError)
        given["policy"] = as_optional("policy", given.get("policy"), MeasurementPolicy, TuningError)
        given["progress"] = as_progress(given.get("progress"))
        if given.get("buckets") is not None:
            given["buckets"] = checked_buckets(given["buckets"], "tuning_buckets")
        if given.get("probes") is not None:
            given["probes"] = TuningConfig(probes=tuple(given["probes"])).probes
        given["skip_ops"] = self.skip_ops | _names("skip_ops", skip_ops)
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def changes(self) -> tuple[Any, ...]:
        """What makes a call site another one than outside: its buckets, rounding, probes and policy."""
        return (self.buckets, self.direction, self.probes, self.policy, self.only_sizes_seen)

    @property
    def direction(self) -> int:
        """1 if sizes are to be rounded up, -1 down, 0 as the specification's map does."""
        if self.round_up:
            return 1
        return -1 if self.buckets is not None else 0

    def apply(self, config: TuningConfig) -> TuningConfig:
        """The configuration with these buckets and probes."""
        if self.buckets is not None:
            mapper = make_bucket_mapper(self.buckets, bool(self.round_up))
            specs = tuple(
                DynamicTensorSpec(s.input_idx, s.dim_idx, self.buckets, mapper, s.tensor_initializers)
                for s in config.dynamic_tensor_specs
            )
            config = replace(config, dynamic_tensor_specs=specs)
        elif self.only_sizes_seen:
            specs = tuple(
                DynamicTensorSpec(
                    s.input_idx, s.dim_idx, _alone, s.map_to_tuning_buckets, s.tensor_initializers
                )
                for s in config.dynamic_tensor_specs
            )
            config = replace(config, dynamic_tensor_specs=specs)
        return config if self.probes is None else replace(config, probes=self.probes, accepts=())


def _names(argument: str, given: Iterable[str] | str | None) -> frozenset[str]:
    """Names, of which one may be given as it is."""
    if isinstance(given, str):
        return frozenset((given,))
    if given is not None and not isinstance(given, Iterable):
        raise TuningError(f"{argument} must be names of operations, got {given!r}")
    return frozenset(given or ())


def _alone(size: int) -> tuple[int]:
    return (size,)


class _Entered:
    """One context that was entered."""

    __slots__ = ("forks", "open", "options", "owner", "thread")

    def __init__(self, owner: Contexts, options: Options) -> None:
        self.owner, self.options = owner, options
        self.thread, self.forks, self.open = threading.get_ident(), _forks, True


_entered: ContextVar[tuple[_Entered, ...]] = ContextVar("moestro_autotune", default=())
_forks = 0  # of which this process is the child


class Contexts:
    """The contexts of one tuner; `active` counts those that are open, of all threads and tasks."""

    def __init__(self) -> None:
        self.active = 0
        self._lock = threading.Lock()

    @property
    def current(self) -> Options | None:
        """The options that count here, or None outside every context."""
        for entered in reversed(_entered.get()):
            if entered.owner is self and entered.open:
                mine = entered.thread == threading.get_ident() and entered.forks == _forks
                return entered.options if mine else None
        return None

    def push(self, options: Options) -> _Entered:
        """Enter a context; what it returns is for pop()."""
        entered = _Entered(self, options)
        _entered.set((*_entered.get(), entered))
        with self._lock:
            self.active += 1
        return entered

    def pop(self, entered: _Entered) -> None:
        """Leave it, in whatever task that happens."""
        entered.open = False
        _entered.set(tuple(one for one in _entered.get() if one is not entered))
        with self._lock:
            self.active -= 1

    def forked(self) -> None:
        """This process is a child: another thread may have held the lock when it was made."""
        self._lock = threading.Lock()


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)

"""What an `autotune(...)` context says, and for which thread.

Contexts nest per thread: an inner one inherits what it does not set, adds to the skipped ops, and is gone
when it is left. A thread without a context never tunes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.group import Group
from moestro.tuning.measure.budget import Budget
from moestro.tuning.progress import Progress
from moestro.tuning.spec.buckets import checked_buckets, make_bucket_mapper
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.specs import DynamicTensorSpec, Probe, TuningConfig
from moestro.tuning.store.store import Store

__all__ = ["Contexts", "Options"]


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

    def inner(self, *, skip_ops: Iterable[str] | None, **given: Any) -> Options:
        """The options of a context inside this one."""
        if given.get("buckets") is not None:
            given["buckets"] = checked_buckets(given["buckets"], "tuning_buckets")
        if given.get("probes") is not None:
            given["probes"] = TuningConfig(probes=tuple(given["probes"])).probes
        if isinstance(skip_ops, str):
            raise TuningError(f"skip_ops must be a set of op names, got the string {skip_ops!r}")
        given["skip_ops"] = self.skip_ops | frozenset(skip_ops or ())
        return replace(self, **{name: value for name, value in given.items() if value is not None})

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
        return config if self.probes is None else replace(config, probes=self.probes)


class Contexts:
    """The stacks of options, one a thread; `active` counts the contexts of all threads."""

    def __init__(self) -> None:
        self.active = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def current(self) -> Options | None:
        """The options of this thread, or None outside every context."""
        stack = getattr(self._local, "stack", None)
        return stack[-1] if stack else None

    def push(self, options: Options) -> None:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        self._local.stack.append(options)
        with self._lock:
            self.active += 1

    def pop(self) -> None:
        self._local.stack.pop()
        with self._lock:
            self.active -= 1

"""Clocks for candidates. A timer has a name and `prepare(call) -> sampler`; `sampler()` runs the call once,
as it is served, and returns seconds. Any object with these two will do (see moestro.tuning.measure.simulated for
one on paper).

`prepare` warms up (and captures, for a CUDA graph); what it raises is the candidate's failure. Both set the
measurement scope, so `is_in_profile_measurement()` is true in every run of the call and nowhere else.

CPU: perf_counter_ns around the call. Calls below `min_sample_seconds` are repeated, each with its own
window, and averaged. Cold cache: before each window every thread reads through a buffer twice the
last-level cache; reads, because written lines would have to be written back inside the window.

CUDA: see moestro.tuning.measure.cuda_timer.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from moestro.errors import TuningError
from moestro.machine import last_level_cache_bytes
from moestro.tuning.measure.scope import is_in_profile_measurement, measurement
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["CpuTimer", "Timer", "as_timer", "default_timer", "is_in_profile_measurement"]

WARM_UP_SECONDS = 0.2  # a call that takes longer has warmed up in its first run


class Timer(Protocol):
    @property
    def name(self) -> str:
        """Part of a decision's key: what kind of clock it was measured by."""

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Warm up; the sampler that runs `call` once, as served, and returns seconds."""


def as_timer(timer: Timer | None) -> Timer | None:
    """A timer, or None for none. Raises TuningError for anything else."""
    if timer is not None and not (hasattr(timer, "name") and callable(getattr(timer, "prepare", None))):
        raise TuningError(f"timer must have a name and prepare(call), or be None, got {timer!r}")
    return timer


def default_timer(device: str, policy: MeasurementPolicy, *, graph: bool = False) -> Timer:
    """The timer for a device ("cpu", "cuda", "cuda:1"); graph: the call is served from a CUDA graph."""
    if device.startswith("cuda"):
        from moestro.tuning.measure.cuda_timer import CudaTimer

        return CudaTimer(policy, device=device, graph=graph)
    return CpuTimer(policy)


class CpuTimer:
    """Wall time of a synchronous call."""

    def __init__(self, policy: MeasurementPolicy | None = None, cache_bytes: int | None = None) -> None:
        """cache_bytes: what a cold cache must be flushed of; the machine's last-level cache if None."""
        self.policy = policy or MeasurementPolicy()
        self.name = "cpu-cold" if self.policy.cold_cache else "cpu-warm"
        self._cache_bytes = cache_bytes
        self._flush: Callable[[], Any] | None = (
            None  # made when first needed: a tuner that looks up needs none
        )

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        if self.policy.cold_cache and self._flush is None:
            self._flush = _reader(2 * (self._cache_bytes or last_level_cache_bytes()))
        least, spent, seconds = self.policy.min_sample_seconds, 0.0, math.inf
        for _ in range(max(1, self.policy.warmup)):
            # The shortest: one interrupted run must not decide that a short call is a long one.
            seconds = min(seconds, self._once(call))
            spent += seconds
            if spent > WARM_UP_SECONDS:
                break
        repeats = math.ceil(least / max(seconds, 1e-9)) if seconds < least else 1
        repeats = min(repeats, 1000)

        def sample() -> float:
            return sum(self._once(call) for _ in range(repeats)) / repeats

        return sample

    def _once(self, call: Callable[[], Any]) -> float:
        if self._flush is not None:
            self._flush()
        with measurement():
            start = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - start) * 1e-9


def _reader(size: int) -> Callable[[], Any]:
    """Reads through `size` bytes, with torch's threads where torch is loaded.

    A numpy sum runs in one thread and leaves the other cores' private caches warm.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        buffer = torch.zeros(size // 4, dtype=torch.float32)
        return lambda: buffer.sum()
    array = np.zeros(size // 8)
    array.fill(0.0)  # zeros() maps every page to the same zero page until it is written
    return array.sum

"""The clocks of the bench."""

from __future__ import annotations

from collections.abc import Callable

from moestro.bench.contenders import Call, Contender
from moestro.bench.measure import Timer
from moestro.errors import TuningError
from moestro.tuning.measure.timers import default_timer
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["GraphOrEager", "timer_for"]


class GraphOrEager:
    """CUDA-graph replay where a call can be captured, eager where it can't (it waits for the device, say)."""

    def __init__(self, device: str, policy: MeasurementPolicy) -> None:
        self._graph = default_timer(device, policy, graph=True)
        self._eager = default_timer(device, policy, graph=False)
        self.name = self._graph.name

    def prepare(self, call: Call) -> Callable[[], float]:
        try:
            sampler = self._graph.prepare(call)
        except TuningError:
            self.name = self._eager.name
            return self._eager.prepare(call)
        self.name = self._graph.name
        return sampler


def timer_for(device: str) -> Callable[[Contender], Timer]:
    """A timer per contender: cold caches, as served (CUDA graphs where they can be)."""
    policy = MeasurementPolicy()
    if device.startswith("cuda"):
        return lambda _: GraphOrEager(device, policy)
    timer = default_timer(device, policy)
    return lambda _: timer

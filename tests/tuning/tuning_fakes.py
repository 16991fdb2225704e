"""A kernel on paper: its time is a function of size and tactic, on a simulated clock; its inputs are shapes
only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.tuning import (
    AutoTuner,
    DynamicTensorSpec,
    MeasurementPolicy,
    TunableRunner,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    map_to_hybrid_bucket_uncapped,
)
from moestro.tuning.measure.simulated import SimulatedClock, SimulatedTimer

FAST_LATER: dict[Any, Any] = {-1: 1e-3, 0: lambda n: n * 1e-6, 1: 5e-4}  # 0 is the best up to 500, 1 beyond
WRONG = "wrong numbers"  # a time: fast, and gives what the others do not give


@dataclass(frozen=True)
class Fake:
    """A tensor without values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"

    def new_empty(self, shape: Sequence[int]) -> Fake:
        return Fake(tuple(shape), self.dtype, self.device)


class Kernel(TunableRunner):
    """Seconds of a run: times[tactic], a number, an error, or a function of the size."""

    def __init__(self, clock: SimulatedClock, times: dict[Any, Any], **config: Any) -> None:
        self._clock = clock
        self._times = times
        self._runs: list[tuple[int, Any]] = []
        self.__dict__.update(config)

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        return [tactic for tactic in self._times if tactic != -1]

    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        if do_preparation:
            return None
        size = inputs[0].shape[0]
        self._runs.append((size, tactic))
        time = self._times[tactic]
        if isinstance(time, Exception):
            raise time
        if time is WRONG:
            self._clock.advance(1e-5)
            return 1.0
        seconds = time(size) if callable(time) else time
        if isinstance(seconds, Exception):
            raise seconds
        self._clock.advance(seconds)
        return None

    @property
    def sizes(self) -> set[int]:
        """Sizes that were run at all."""
        return {size for size, _ in self._runs}


def quiet_clock(**changes: Any) -> SimulatedClock:
    return SimulatedClock(**{"noise": 0.002, "drift": 0.0, "outliers": 0.0, **changes})


def config(
    gen: Any = get_hybrid_num_tokens_buckets, to_bucket: Callable[[int], int] | None = None, **more: Any
) -> TuningConfig:
    """One dynamic size: the first dimension of the first input."""
    to_bucket = to_bucket or map_to_hybrid_bucket_uncapped
    return TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec((0,), (0,), gen, to_bucket),), **more)


def tuner(clock: SimulatedClock, store: Any = None, **policy: Any) -> AutoTuner:
    """A tuner whose time, budgets included, is the clock's."""
    policy = {"max_seconds": None, **policy}
    return AutoTuner(store, SimulatedTimer(clock), MeasurementPolicy(**policy), clock=lambda: clock.now)


def inputs(size: int, width: int = 64) -> list[Any]:
    return [Fake((size, width)), Fake((width, width))]

"""What a look-up costs, in time and in memory, and whether a measurement in another thread delays it.

    python benchmarks/hot_path.py [--json benchmarks/results/hot_path.json]

Twelve torch inputs, of which two have the dynamic size, and one runner, tuned on a simulated clock up to
20,000: the kernel itself costs nothing here. The yardstick is a dictionary look-up keyed by two shape
attributes. Times are the smallest mean of several repeats; latencies beside a measurement are single calls,
every one of them timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import threading
import time
import timeit
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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

LARGEST = 20_000
LOOK_UPS = 1_000_000


class Kernel(TunableRunner):
    """Tactic 1 wins up to 2900, tactic 2 beyond; `pause` keeps a measurement busy on the CPU, as launches
    would.
    """

    def __init__(self, clock: SimulatedClock, pause: float = 0.0) -> None:
        self.tile, self.stages, self.name = (128, 64), 3, "paper"
        self._clock, self._pause = clock, pause

    def get_valid_tactics(self, inputs: Any, profile: Any) -> list[int]:
        return [1, 2]

    def forward(self, inputs: Any, tactic: int = -1, do_preparation: bool = False, **kwargs: Any) -> None:
        until = time.perf_counter() + self._pause
        while time.perf_counter() < until:
            pass
        self._clock.advance({-1: 1e-3, 1: 4e-4 + inputs[0].shape[0] * 1e-7, 2: 6.9e-4}[tactic])


def tensors(size: int) -> list[torch.Tensor]:
    weights = [torch.empty(64, 64) for _ in range(10)]
    return [torch.empty(size, 64), torch.empty(size, 8), *weights]


def nanoseconds(call: Callable[[], Any], number: int = 50_000, repeat: int = 7) -> float:
    """Of one call: the smallest mean of several repeats, less that of an empty call."""
    empty = min(timeit.repeat(lambda: None, number=number, repeat=repeat))
    return (min(timeit.repeat(call, number=number, repeat=repeat)) - empty) / number * 1e9


def growth(pick: Callable[[Any], Any]) -> float:
    """Bytes that a million look-ups of 20,000 sizes leave behind."""
    weights = tensors(1)[2:]
    wide, narrow = torch.empty(LARGEST, 64), torch.empty(LARGEST, 8)
    inputs = [[wide[:n], narrow[:n], *weights] for n in range(1, LARGEST + 1)]
    for one in inputs:
        pick(one)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(LOOK_UPS // LARGEST):
        for one in inputs:
            pick(one)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return float(left)


def latencies(pick: Callable[[Any], Any], inputs: Any, seconds: float = 1.0) -> list[float]:
    """Microseconds of every single look-up for so long."""
    found, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        pick(inputs)
        found.append((time.perf_counter() - start) * 1e6)
    return found


def beside_a_measurement(
    tuner: AutoTuner, clock: SimulatedClock, config: TuningConfig, pick: Callable[[Any], Any]
) -> dict[str, float]:
    """Latency of look-ups, with another thread measuring, and with another thread that only computes in
    Python.
    """
    stop = threading.Event()

    def measure() -> None:
        while not stop.is_set():
            with tuner.autotune(True, budget_s=0.2):
                tuner.choose_one(f"busy {time.perf_counter()}", [Kernel(clock, 2e-4)], config, tensors(64))

    def compute() -> None:
        while not stop.is_set():
            until = time.perf_counter() + 2e-4
            while time.perf_counter() < until:
                pass

    inputs, found = tensors(600), {}
    for name, work in (("measuring", measure), ("computing", compute)):
        stop.clear()
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        times = sorted(latencies(pick, inputs))
        stop.set()
        thread.join()
        found[f"median while {name}, µs"] = statistics.median(times)
        found[f"99.9 % while {name}, µs"] = times[int(len(times) * 0.999)]
        found[f"worst while {name}, ms"] = times[-1] / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock = SimulatedClock(noise=0.002, drift=0.0, outliers=0.0)
    tuner = AutoTuner(timer=SimulatedTimer(clock), policy=MeasurementPolicy(verify=False))
    spec = DynamicTensorSpec((0, 1), (0, 0), get_hybrid_num_tokens_buckets, map_to_hybrid_bucket_uncapped)
    config, runners = TuningConfig(dynamic_tensor_specs=(spec,)), [Kernel(clock)]
    with tuner.autotune(True):
        tuner.choose_one("op", runners, config, tensors(LARGEST))
    pick, inputs = tuner.bind("op", runners, config), tensors(600)

    def choose(given: Any) -> Any:
        return tuner.choose_one("op", runners, config, given)

    assert pick(inputs) == choose(inputs) == (runners[0], 1)
    assert pick(tensors(3300)) == choose(tensors(3300)) == (runners[0], 2)
    x, table = inputs[0], {(600, 64): (runners[0], 1)}
    yardstick = nanoseconds(lambda: table[x.shape[0], x.shape[1]])
    bound = nanoseconds(lambda: pick(inputs))
    chosen = nanoseconds(lambda: tuner.choose_one("op", runners, config, inputs))
    with tuner.autotune(True):
        tuning = nanoseconds(lambda: tuner.choose_one("op", runners, config, inputs), 5_000)
    results: dict[str, float] = {
        "dictionary look-up of two shape attributes, ns": yardstick,
        "bind hit, ns": bound,
        "bind hit / dictionary look-up": bound / yardstick,
        "choose_one hit, 12 inputs, µs": chosen / 1e3,
        "choose_one hit inside autotune(True), µs": tuning / 1e3,
        "bytes left by a million bind look-ups of 20,000 sizes": growth(pick),
        "bytes left by a million choose_one look-ups of 20,000 sizes": growth(choose),
        **beside_a_measurement(tuner, clock, config, pick),
    }
    for name, value in results.items():
        print(f"{name:<62} {value:>12.2f}")
    if arguments.json is not None:
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({**facts, "results": results}, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()

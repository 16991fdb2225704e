"""Timers: what they run, in which scope, and what they flush. No test asserts how long something took."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from moestro import machine
from moestro.machine import last_level_cache_bytes
from moestro.tuning import MeasurementPolicy, is_in_profile_measurement
from moestro.tuning.measure import timers
from moestro.tuning.measure.scope import measured, measurement
from moestro.tuning.measure.simulated import SimulatedClock, SimulatedTimer
from moestro.tuning.measure.timers import CpuTimer, default_timer

WARM = MeasurementPolicy(cold_cache=False, warmup=3)


class Ticks:
    """A clock that shows what it is told, in nanoseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(timers.time, "perf_counter_ns", lambda: self.now)

    def call(self, nanoseconds: int) -> Any:
        def run() -> None:
            self.now += nanoseconds

        return run


def test_a_sample_is_the_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    sampler = CpuTimer(WARM).prepare(ticks.call(2_500_000))
    before = ticks.now
    assert sampler() == pytest.approx(2.5e-3)
    assert ticks.now - before == 2_500_000


def test_a_short_call_is_repeated_to_a_time_that_can_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    sampler = CpuTimer(WARM).prepare(ticks.call(600))
    before = ticks.now
    assert sampler() == pytest.approx(600e-9)
    assert ticks.now - before >= 20_000


def test_warm_up_runs_come_before_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, runs = Ticks(monkeypatch), []
    timer = CpuTimer(MeasurementPolicy(cold_cache=False, warmup=5))
    timer.prepare(lambda: runs.append(ticks.call(10**6)()))
    assert len(runs) == 5


def test_a_long_call_is_warmed_up_by_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, runs = Ticks(monkeypatch), []
    CpuTimer(WARM).prepare(lambda: runs.append(ticks.call(10**9)()))
    assert len(runs) == 1


def test_a_cold_cache_is_flushed_before_every_window_and_outside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    events: list[str] = []
    timer = CpuTimer(MeasurementPolicy(warmup=0), cache_bytes=1 << 20)

    def flush() -> None:
        events.append("flush")
        ticks.now += 10**9

    def call() -> None:
        events.append("call")
        ticks.now += 10_000

    timer._flush = flush
    sampler = timer.prepare(call)
    events.clear()
    assert sampler() == pytest.approx(10e-6)
    assert events == ["flush", "call", "flush", "call"]
    assert (timer.name, CpuTimer(WARM).name) == ("cpu-cold", "cpu-warm")


def test_the_flush_reads_twice_the_cache_and_is_made_once_and_only_for_cold_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def reader(size: int) -> Any:
        sizes.append(size)
        return lambda: None

    monkeypatch.setattr(timers, "_reader", reader)
    for policy in (MeasurementPolicy(), WARM):
        timer = CpuTimer(policy, cache_bytes=3 << 20)
        timer.prepare(lambda: None)
        timer.prepare(lambda: None)
    assert sizes == [6 << 20]


@pytest.mark.parametrize("torch_is_loaded", [True, False])
def test_reading_through_a_buffer_runs_with_and_without_torch(
    monkeypatch: pytest.MonkeyPatch, torch_is_loaded: bool
) -> None:
    if torch_is_loaded:
        pytest.importorskip("torch")
    else:
        monkeypatch.delitem(timers.sys.modules, "torch", raising=False)
    assert timers._reader(1 << 16)() == 0


def test_what_the_call_raises_is_raised_by_prepare_and_closes_the_scope() -> None:
    def call() -> None:
        raise ValueError("no such tile")

    with pytest.raises(ValueError, match="no such tile"):
        CpuTimer(WARM).prepare(call)
    assert not is_in_profile_measurement()


def test_the_scope_is_on_in_every_run_and_off_around_them_and_in_other_threads() -> None:
    inside: list[bool] = []
    elsewhere: list[bool] = []

    def call() -> None:
        inside.append(is_in_profile_measurement())
        thread = threading.Thread(target=lambda: elsewhere.append(is_in_profile_measurement()))
        thread.start()
        thread.join()

    sampler = CpuTimer(WARM).prepare(call)
    assert not is_in_profile_measurement()
    sampler()
    assert not is_in_profile_measurement()
    assert set(inside) == {True}
    assert set(elsewhere) == {False}


def test_scopes_nest() -> None:
    with measurement():
        assert measured(is_in_profile_measurement)()
        assert is_in_profile_measurement()
    assert not is_in_profile_measurement()


def cache(root: Path, cpu: int, index: int, **files: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_the_last_level_cache_is_counted_once_for_the_cpus_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for cpu in range(3):
        cache(tmp_path, cpu, 0, type="Data", level="1", shared_cpu_list=str(cpu), size="48K")
        cache(tmp_path, cpu, 1, type="Instruction", level="1", shared_cpu_list=str(cpu), size="32K")
        shared = "0-1" if cpu < 2 else "2-3"
        cache(tmp_path, cpu, 3, type="Unified", level="3", shared_cpu_list=shared, size="32M")
    assert last_level_cache_bytes(tmp_path) == 2 * (32 << 20)


def test_a_machine_that_tells_nothing_of_its_caches_gets_a_guess(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) == machine.CACHE_GUESS
    cache(tmp_path, 0, 0, type="Unified", level="three", shared_cpu_list="0", size="?")
    assert last_level_cache_bytes(tmp_path) == machine.CACHE_GUESS


def test_the_default_timer_of_a_cpu_is_the_cpu_timer() -> None:
    assert isinstance(default_timer("cpu", WARM), CpuTimer)


def test_a_simulated_timer_reads_virtual_time() -> None:
    clock = SimulatedClock(noise=0, drift=0, outliers=0)
    sampler = SimulatedTimer(clock).prepare(lambda: clock.advance(0.25))
    assert [sampler(), sampler()] == [0.25, 0.25]
    assert (clock.now, clock.runs) == (0.5, 2)


def test_a_simulated_clock_has_the_noise_drift_and_outliers_that_it_was_given() -> None:
    import numpy as np

    noisy = SimulatedClock(noise=0.02, drift=0, outliers=0.01, outlier_factor=3, seed=1)
    logs = np.log([noisy.advance(1e-3) for _ in range(20_000)]) - np.log(1e-3)
    outliers = logs > 0.5
    assert outliers.mean() == pytest.approx(0.01, abs=0.003)
    assert logs[~outliers].std() == pytest.approx(0.02, rel=0.05)
    drifting = SimulatedClock(noise=0, drift=0.05, outliers=0, drift_period=1.0)
    times = [drifting.advance(1e-3) for _ in range(2000)]
    assert (min(times), max(times)) == (pytest.approx(0.95e-3, rel=1e-3), pytest.approx(1.05e-3, rel=1e-3))

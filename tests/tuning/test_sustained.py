"""Long calls are raced on a device that is as slow as it gets, and the evidence says what its clock did."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock

from moestro.errors import TuningError
from moestro.tuning import AutoTuner, MeasurementPolicy
from moestro.tuning.measure import nvml
from moestro.tuning.measure.simulated import SimulatedClock
from moestro.tuning.store.environment import environment_for


@dataclass
class Hot:
    """A timer on paper of a device whose clock falls from 1980 to 1400 MHz after a second of load: tactic 0, bound
    by arithmetic, then takes longer, tactic 1, bound by memory, does not.
    """

    clock: SimulatedClock
    name: str = "hot"
    sustains: bool = True

    @property
    def mhz(self) -> int:
        return 1980 if self.clock.now < 1.0 else 1400

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            before = self.clock.now
            call()
            return self.clock.now - before

        return sample

    def conditions(self) -> dict[str, Any]:
        return {"sm_mhz": self.mhz, "throttle": [] if self.mhz == 1980 else ["power cap"]}


def tuned(size: int, seconds: float, sustains: bool = True) -> tuple[Any, Any]:
    """(tactic, evidence) of a tuning at one size."""
    clock = quiet_clock()
    timer = Hot(clock, sustains=sustains)
    times = {-1: 3e-3, 0: lambda n: 1e-3 * 1980 / timer.mhz, 1: 1.15e-3}
    policy = MeasurementPolicy(max_seconds=None, verify=False, sustained_s=seconds)
    t = AutoTuner(timer=timer, policy=policy, clock=lambda: clock.now)
    runner, cfg = Kernel(clock, times), config((size,))
    with t.autotune(True):
        tactic = t.choose_one("op", [runner], cfg, inputs(size))[1]
    decision = t.decision("op", [runner], cfg, inputs(size))
    assert decision is not None
    return tactic, decision.evidence.conditions


def test_the_winner_is_the_one_that_wins_after_seconds_of_load() -> None:
    assert tuned(1024, 0.0)[0] == 0, "on the boost clock"
    tactic, conditions = tuned(1024, 2.0)
    assert tactic == 1
    assert conditions["sm_mhz"] == [1400, 1980]
    assert conditions["throttle"] == ["power cap"]
    assert 2.0 <= conditions["loaded_s"] < 2.1


@pytest.mark.parametrize(("size", "sustains"), [(1023, True), (1024, False)])
def test_short_calls_and_other_devices_are_not_loaded(size: int, sustains: bool) -> None:
    tactic, conditions = tuned(size, 2.0, sustains)
    assert tactic == 0
    assert "loaded_s" not in conditions


def test_load_takes_a_quarter_of_a_budget_at_most() -> None:
    clock = quiet_clock()
    timer = Hot(clock)
    t = AutoTuner(
        timer=timer, policy=MeasurementPolicy(max_seconds=None, sustained_s=60), clock=lambda: clock.now
    )
    with t.autotune(True, budget_s=4.0):
        t.choose_one("op", [Kernel(clock, {-1: 3e-3, 0: 1e-3})], config((2048,)), inputs(2048))
    assert clock.now < 4.4
    record = t.decision("op", [Kernel(clock, {-1: 3e-3, 0: 1e-3})], config((2048,)), inputs(2048))
    assert record is not None
    assert 0.9 < record.evidence.conditions["loaded_s"] < 1.1


def test_decisions_made_before_there_was_this_setting_stay_valid() -> None:
    facts = environment_for("cpu", [], MeasurementPolicy(), "cpu-cold").facts["policy"]
    assert "sustained_s" not in facts
    other = environment_for("cpu", [], MeasurementPolicy(sustained_s=9.0), "cpu-cold").facts["policy"]
    assert other == {**facts, "sustained_s": 9.0}


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_load_that_is_no_number_of_seconds_is_an_error(seconds: float) -> None:
    with pytest.raises(TuningError, match="sustained_s"):
        MeasurementPolicy(sustained_s=seconds)


class Nvml:
    """NVML with one GPU."""

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        return 0 if uuid == b"GPU-abc" else 6

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, clock: Any) -> int:  # noqa: N802
        ctypes.cast(clock, ctypes.POINTER(ctypes.c_uint))[0] = 1410
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, reasons: Any) -> int:  # noqa: N802
        ctypes.cast(reasons, ctypes.POINTER(ctypes.c_ulonglong))[0] = 0x4 | 0x20
        return 0


def test_nvml_says_the_clock_and_why_it_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "library", Nvml)
    assert nvml.reading("abc") == {"sm_mhz": 1410, "throttle": ["power cap", "thermal, software"]}
    assert nvml.reading("GPU-of another host") is None
    monkeypatch.setattr(nvml, "library", lambda: None)
    assert nvml.reading("abc") is None

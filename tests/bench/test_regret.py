"""The regret harness: its numbers, its simulated targets in small, and a real case on a simulated clock."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from moestro.bench import regret_sim
from moestro.bench.regret import Pick, summarise
from moestro.bench.regret_real import Case, consult, load, measure_regret
from moestro.bench.regret_sim import SCENARIOS, Scenario, Target, run, tune_once
from moestro.cli import regret as command
from moestro.errors import TuningError
from moestro.tuning import (
    AutoTuner,
    DynamicTensorSpec,
    MeasurementPolicy,
    Probe,
    TunableRunner,
    TuningConfig,
)
from moestro.tuning.measure import nvml
from moestro.tuning.measure.simulated import SimulatedClock, SimulatedTimer


# --- numbers ---
def test_a_summary_counts_flips_between_repetitions_and_quantiles_of_regret() -> None:
    picks = [
        Pick(0, 0.0, -0.1, 10, 1.0),
        Pick(0, 0.0, -0.1, 20, 1.0),
        Pick(0, 0.0, -0.1, 30, 1.0),
        Pick(1, 0.2, 0.1, 40, 5.0, noise_floor=0.05),
    ]
    found = summarise("x", picks)
    assert (found.best_picked, found.same_pick, found.flips) == (0.75, 0.75, 0.5)
    assert (found.regret_median, found.regret_worst) == (0.0, 0.2)
    assert found.regret_p95 == pytest.approx(0.17)
    assert (found.slower_than_default, found.samples, found.seconds) == (0.25, 25.0, 2.0)


def test_a_pick_within_the_noise_floor_is_not_slower_than_the_default() -> None:
    assert summarise("x", [Pick(0, 0.1, 0.01, 1, 1.0, noise_floor=0.02)]).slower_than_default == 0


def test_a_pick_within_the_error_of_the_best_counts_as_the_best() -> None:
    picks = [Pick(0, 0.01, -0.1, 1, 1.0), Pick(1, 0.03, -0.1, 1, 1.0)]
    assert (summarise("x", picks).best_picked, summarise("x", picks, 0.02).best_picked) == (0.0, 0.5)
    assert (summarise("x", picks).near_best, summarise("x", picks, 0.03).near_best) == (0.5, 1.0)


# --- on paper ---
def named(name: str) -> Scenario:
    return next(s for s in SCENARIOS if s.name == name)


def test_the_ladder_in_small_holds_its_targets_where_the_field_does_not() -> None:
    outcome = run(named("ladder"), 60)
    ours, field = outcome.summaries
    assert outcome.held
    assert (ours.best_picked, ours.flips) == (1.0, 0.0)
    assert field.best_picked < 0.8
    assert field.samples == 13 * 16


def test_repeated_tunings_list_the_tactics_alike_and_are_repeated_by_seed() -> None:
    ladder = named("ladder")
    assert ladder.order(6) == ladder.order(7) != ladder.order(8)
    assert tune_once(ladder, 6) == tune_once(ladder, 6) != tune_once(ladder, 7)


def test_a_target_that_is_missed_fails_the_scenario() -> None:
    never = dataclasses.replace(named("tie"), targets=(Target("samples", most=10.0),))
    outcome = run(never, 4)
    assert not outcome.held
    assert outcome.targets[0][1] == outcome.summaries[0].samples


def test_processes_change_no_number() -> None:
    scenario = named("default 2 % behind")
    assert run(scenario, 6, processes=2).summaries == run(scenario, 6).summaries


# --- on a device ---
class Paper(TunableRunner):
    """Tactics with known times on a simulated clock."""

    def __init__(self, clock: SimulatedClock, times: dict[Any, float]) -> None:
        self._clock = clock
        self._times = times

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        return [tactic for tactic in self._times if tactic != -1]

    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> None:
        if tactic == "broken":
            raise RuntimeError("no")
        if not do_preparation:
            self._clock.advance(self._times[tactic])


@dataclasses.dataclass(frozen=True)
class Fake:
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"

    def new_empty(self, shape: Sequence[int]) -> Fake:
        return Fake(tuple(shape))


def paper_case(clock: SimulatedClock, times: dict[Any, float], probes: tuple[Probe, ...] = ()) -> Case:
    spec = DynamicTensorSpec((0,), (0,), (64,), lambda n: 64)
    config = TuningConfig(dynamic_tensor_specs=(spec,), probes=probes)
    return Case("op", [Paper(clock, times)], config, [Fake((64, 8))])


def test_a_real_case_reports_the_oracle_the_picks_and_their_regret() -> None:
    clock = SimulatedClock(noise=0.01, drift=0.05, outliers=0.01, seed=4)
    case = paper_case(clock, {-1: 1.2e-3, 0: 1.1e-3, 1: 1e-3, 2: 3e-3})
    found = measure_regret(case, SimulatedTimer(clock), MeasurementPolicy(), repeats=4, oracle_seconds=0.05)
    assert found.oracle.ratios[2] == pytest.approx(1 / 1.2, rel=0.03)
    assert found.oracle.best == found.oracle.ratios[2]
    assert found.picks == ("Paper 1",) * 4
    assert (
        found.moestro.regret_worst,
        found.moestro.slower_than_default,
        found.moestro.same_pick,
    ) == (0.0, 0.0, 1.0)
    assert found.moestro.samples > 0
    assert found.field.samples == 4 * 13


def test_a_tactic_that_cannot_run_has_no_ratio_and_is_not_picked() -> None:
    clock = SimulatedClock(noise=0.01, seed=4)
    case = paper_case(clock, {-1: 1.2e-3, "broken": 0.1e-3, 1: 1e-3})
    found = measure_regret(case, SimulatedTimer(clock), MeasurementPolicy(), repeats=2, oracle_seconds=0.0)
    assert found.oracle.ratios[1] == math.inf
    assert found.picks == ("Paper 1",) * 2


def test_an_oracle_without_a_default_is_an_error() -> None:
    with pytest.raises(TuningError, match="default tactic cannot be measured"):
        consult([(0, -1), (0, 1)], [None, lambda: 1.0], MeasurementPolicy(), 0.0)


def test_several_probes_are_an_error() -> None:
    clock = SimulatedClock()
    probes = tuple(Probe(name, lambda inputs, profile, seed: inputs) for name in "ab")
    case = paper_case(clock, {-1: 1.0, 1: 1.0}, probes)
    with pytest.raises(TuningError, match="one probe at a time, got 2"):
        measure_regret(case, SimulatedTimer(clock), MeasurementPolicy())


# --- the command ---
def invoke(*args: str) -> Any:
    app = Typer()
    app.command()(command.regret)
    return CliRunner().invoke(app, list(args))


def test_the_command_prints_schemes_and_targets_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regret_sim, "SCENARIOS", (named("default 2 % behind"),))
    file = tmp_path / "r.json"
    done = invoke("--simulate", "--tunings", "10", "--processes", "1", "--json", str(file))
    assert done.exit_code == 0, done.output
    assert "holds same pick at least 99%" in done.output
    row = json.loads(file.read_text())["rows"][0]
    assert [s["scheme"] for s in row["schemes"]] == ["moestro", "field"]
    assert all(target["held"] for target in row["targets"])


def test_the_command_fails_when_a_target_does(monkeypatch: pytest.MonkeyPatch) -> None:
    never = dataclasses.replace(named("default 2 % behind"), targets=(Target("samples", most=1.0),))
    monkeypatch.setattr(regret_sim, "SCENARIOS", (never,))
    done = invoke("--simulate", "--tunings", "10", "--processes", "1")
    assert done.exit_code == 1
    assert "FAILS samples at most" in done.output


@pytest.mark.parametrize(("sustains", "seconds", "runs"), [(True, 2.0, 8), (True, 0.0, 0), (False, 2.0, 0)])
def test_the_oracle_begins_on_a_loaded_device_where_the_timer_says_that_it_slows_down(
    monkeypatch: pytest.MonkeyPatch, sustains: bool, seconds: float, runs: int
) -> None:
    class Timer:
        name = "hot"

        def prepare(self, call: Any) -> Any:
            return call

    Timer.sustains = sustains  # type: ignore[attr-defined]
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def sampler() -> float:
        now[0] += 0.25
        return 0.25

    load(sampler, MeasurementPolicy(sustained_s=seconds), Timer())
    assert now[0] == 10.0 + 0.25 * runs


class Chip:
    """A GPU on paper: a call takes longer the slower its clock, which falls from 1980 to 1400 MHz in a second of load.
    NVML is asked for the clock by the names of the library."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0

    @property
    def mhz(self) -> int:
        return 1980 if self.now < 1.0 else 1400

    # --- as NVML ---
    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, clock: Any) -> int:  # noqa: N802
        self.asked += 1
        ctypes.cast(clock, ctypes.POINTER(ctypes.c_uint))[0] = self.mhz
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, reasons: Any) -> int:  # noqa: N802
        ctypes.cast(reasons, ctypes.POINTER(ctypes.c_ulonglong))[0] = 0x4 if self.mhz == 1400 else 0
        return 0

    # --- as a timer ---
    name, sustains = "chip", True

    def conditions(self) -> dict[str, Any] | None:
        return nvml.reading("GPU-chip")

    def prepare(self, call: Any) -> Any:
        def sample() -> float:
            before = self.now
            call()
            return self.now - before

        return sample


class OnChip(TunableRunner):
    """Tactic 0 waits for arithmetic, 1 for memory: the clock decides which of them is faster."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip

    def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
        return [0, 1]

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **_: Any) -> Any:
        if not do_preparation:
            chip = self._chip
            chip.now += {-1: 3e-3, 0: 1e-3 * 1980 / chip.mhz, 1: 1.15e-3}[tactic]
        return inputs[0]


@pytest.mark.parametrize(("sustained", "best"), [(0.0, "0"), (2.0, "1")])
def test_regret_under_load_is_judged_on_the_clock_that_load_leaves(
    monkeypatch: pytest.MonkeyPatch, sustained: float, best: str
) -> None:
    chip = Chip()
    monkeypatch.setattr(nvml, "library", lambda: chip)
    monkeypatch.setattr(time, "perf_counter", lambda: chip.now)
    spec = DynamicTensorSpec((0,), (0,), (2048,), lambda n: 2048)
    config = TuningConfig(dynamic_tensor_specs=(spec,))
    policy = MeasurementPolicy(sustained_s=sustained, max_seconds=None, verify=False)
    case = Case("op", [OnChip(chip)], config, [torch.zeros(2048, 1)])
    found = measure_regret(
        case,
        chip,
        policy,
        repeats=2,
        oracle_seconds=0.02,
        new_tuner=lambda: AutoTuner(timer=chip, policy=policy, clock=lambda: chip.now),
    )
    ratios = dict(zip(("-1", "0", "1"), found.oracle.ratios, strict=True))
    assert min(ratios, key=ratios.__getitem__) == best, ratios
    if sustained:
        assert found.moestro.best_picked == 1.0
        assert all(best in pick for pick in found.picks)
        assert found.clocks["sm_mhz"] == [1400, 1980]
        assert found.clocks["throttle"] == ["power cap"]
    else:
        assert found.clocks["sm_mhz"][1] == 1980
    assert chip.asked >= 2

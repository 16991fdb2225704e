"""The regret harness: its numbers, its simulated targets in small, and a real case on a simulated clock."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from moestro.bench import regret_sim
from moestro.bench.regret import Pick, summarise
from moestro.bench.regret_real import Case, consult, load, measure_regret
from moestro.bench.regret_sim import SCENARIOS, Scenario, Target, run, tune_once
from moestro.cli import regret as command
from moestro.errors import TuningError
from moestro.tuning import DynamicTensorSpec, MeasurementPolicy, Probe, TunableRunner, TuningConfig
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


def test_the_oracle_begins_on_a_loaded_device_where_the_timer_says_that_it_slows_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Timer:
        name, sustains = "hot", True

        def prepare(self, call: Any) -> Any:
            return call

    now = [0.0]
    runs: list[float] = []

    def sampler() -> float:
        runs.append(now[0])
        now[0] += 1.0
        return 1.0

    monkeypatch.setattr("moestro.bench.regret_real.time.perf_counter", lambda: now[0])
    load(sampler, MeasurementPolicy(sustained_s=20.0), Timer())
    assert len(runs) == 20
    runs.clear()
    load(sampler, MeasurementPolicy(sustained_s=0.0), Timer())
    Timer.sustains = False
    load(sampler, MeasurementPolicy(sustained_s=20.0), Timer())
    assert runs == []

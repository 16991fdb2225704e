"""What a tuner refuses: each error names the argument and what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning import AutoTuner, MeasurementPolicy, autotune


@pytest.mark.parametrize("runners", [[], None, [object()], [Kernel]])
def test_runners_must_be_runners(runners: Any) -> None:
    with pytest.raises(TuningError, match="runner"):
        AutoTuner().choose_one("op", runners, config(), inputs(1))
    with pytest.raises(TuningError, match="runner"):
        AutoTuner().bind("op", runners, config())


def test_a_map_that_goes_down_is_an_error() -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True), pytest.raises(TuningError, match="monotone"):
        t.choose_one(
            "op", [Kernel(clock, {-1: 1e-3})], config((8, 64), lambda x: max(1, 100 - x)), inputs(64)
        )


@pytest.mark.parametrize("reading", [float("nan"), 0.0, -1.0, float("inf"), None, "soon"])
def test_a_clock_that_is_always_senseless_is_an_error_that_names_it(reading: Any, store: Path) -> None:
    class Broken:
        name = "sundial"

        def prepare(self, call: Any) -> Any:
            return lambda: reading

    t = AutoTuner(store, Broken())  # type: ignore[arg-type]
    with t.autotune(True), pytest.raises(TuningError, match="sundial"):
        t.choose_one("op", [Kernel(quiet_clock(), {-1: 1e-3, 0: 1e-3})], config((64,)), inputs(64))
    assert not list(store.rglob("quarantine*"))


@pytest.mark.parametrize("budget", ["5", [1], 10**400, float("nan"), -1, True, b"1"])
def test_a_budget_that_is_no_number_of_seconds_is_an_error(budget: Any) -> None:
    with pytest.raises(TuningError, match="budget_s"), tuner(quiet_clock()).autotune(True, budget_s=budget):
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tune_mode", "folder"),
        ("round_up", "up"),
        ("crossover", 1),
        ("only_sizes_seen", "no"),
        ("policy", 3),
        ("skip_ops", 3),
    ],
)
def test_a_setting_of_another_type_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(TuningError, match=f"{name} must be .*, got {value!r}"), autotune(**{name: value}):
        pass


@pytest.mark.parametrize(("name", "value"), [("timer", 3), ("timer", "cuda"), ("policy", {"seed": 3})])
def test_a_tuner_of_other_parts_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(TuningError, match=f"{name} must .*, got {value!r}"):
        AutoTuner(**{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_rounds", "x"),
        ("max_rounds", 9.5),
        ("verify", "no"),
        ("isolate", 1),
        ("seed", "a"),
        ("tie", None),
    ],
)
def test_a_policy_of_another_type_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(TuningError, match=f"MeasurementPolicy.{field} must be .*, got {value!r}"):
        MeasurementPolicy(**{field: value})


def test_a_policy_is_the_same_whatever_its_numbers_are_made_of() -> None:
    made = MeasurementPolicy(
        verify=np.bool_(False), max_seconds=np.float32(2), sustained_s=1, seed=np.int64(3)
    )
    assert repr(made) == repr(MeasurementPolicy(verify=False, max_seconds=2.0, sustained_s=1.0, seed=3))

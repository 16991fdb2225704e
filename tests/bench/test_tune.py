"""Tuning ahead of serving: what is compiled first, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moestro.bench import tune
from moestro.bench.models import MoeShape
from moestro.kernels.portable.runner import PortableRunner
from moestro.tuning import AutoTuner


def spec(shape: MoeShape, store: Path, **more: Any) -> tune.TuneSpec:
    return tune.TuneSpec(shape, (1, 4, 16), formats=("bf16",), backends=("portable",), store=store, **more)


pytestmark = pytest.mark.usefixtures("short_races")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any]]:
    """What the portable backend compiles (were it to) and runs."""
    found: list[tuple[str, int, Any]] = []
    forward = PortableRunner.forward

    def run(self: PortableRunner, inputs: Any, tactic: Any = -1, **more: Any) -> Any:
        found.append(("run", inputs[0].shape[0], tactic))
        return forward(self, inputs, tactic, **more)

    def compile(self: PortableRunner, inputs: Any, tactic: Any) -> None:
        found.append(("compile", inputs[0].shape[0], tactic))

    monkeypatch.setattr(PortableRunner, "forward", run)
    monkeypatch.setattr(PortableRunner, "compile", compile, raising=False)
    return found


def test_all_sizes_are_compiled_before_anything_is_measured(
    tiny: MoeShape, tmp_path: Path, events: list[tuple[str, int, Any]]
) -> None:
    result = tune.run(spec(tiny, tmp_path), "moestro tune")
    first_run = next(i for i, (what, _, _) in enumerate(events) if what == "run")
    compiled = {(size, tactic) for _, size, tactic in events[:first_run]}
    assert {size for size, _ in compiled} == {1, 4, 16}
    assert events[0][1] == 16  # measured first, so compiled first where time is short
    measured = {(size, tactic) for what, size, tactic in events if what == "run" and size in (1, 4, 16)}
    assert measured <= compiled
    assert {row.tokens for row in result.rows} == {1, 4, 16}


def test_what_sizes_and_tactics_share_is_compiled_once(
    tiny: MoeShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def jobs(self: PortableRunner, inputs: Any, tactic: Any) -> dict[str, Any]:
        name = f"{tactic} of few" if inputs[0].shape[0] < 16 else f"{tactic} of many"
        return {name: lambda: compiled.append(name), "sorting": lambda: compiled.append("sorting")}

    monkeypatch.setattr(PortableRunner, "compile_jobs", jobs, raising=False)
    tune.run(spec(tiny, tmp_path), "moestro tune")
    assert {"sorting", "-1 of few", "-1 of many"} <= set(compiled)
    assert len(compiled) == len(set(compiled))


def test_the_result_says_where_the_time_went(tiny: MoeShape, tmp_path: Path) -> None:
    result = tune.run(spec(tiny, tmp_path), "moestro tune")
    assert list(result.phases) == [
        "bf16: making the layer",
        "bf16: compiling",
        *(f"bf16: N = {size}" for size in (16, 1, 4)),
        "bf16: where winners change",
    ]
    assert sum(result.phases.values()) <= result.seconds
    assert result.to_json()["phases"] == result.phases


def test_sizes_are_decided_from_the_largest_on_with_ever_smaller_gaps(tiny: MoeShape, tmp_path: Path) -> None:
    """Whenever the budget ends, a size that is open has a decided one near: all up to the largest are served."""
    result = tune.run(replace(spec(tiny, tmp_path), tokens=(1, 2, 4, 8, 16)), "moestro tune")
    steps = [phase.rpartition(" ")[2] for phase in result.phases if " N = " in phase]
    assert steps == ["16", "1", "4", "2", "8"]


def test_without_a_budget_left_nothing_is_compiled(
    tiny: MoeShape, tmp_path: Path, events: list[tuple[str, int, Any]]
) -> None:
    result = tune.run(spec(tiny, tmp_path, budget_s=0.0), "moestro tune")
    assert result.rows == []
    assert [what for what, _, _ in events if what == "run"] == []


def test_compiling_takes_two_thirds_of_a_budget_at_most(
    tiny: MoeShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not compiled by then is when its size is tuned; what was, is not again."""
    now = [0.0]
    compiled: list[Any] = []
    before: list[int] = []
    forward = PortableRunner.forward

    def compile(self: PortableRunner, inputs: Any, tactic: Any) -> None:
        compiled.append((inputs[0].shape[0], tactic))
        now[0] += 1.0
        time.sleep(0.06)  # longer than between two looks at the budget

    def run(self: PortableRunner, inputs: Any, tactic: Any = -1, **more: Any) -> Any:
        before.append(len(compiled))
        return forward(self, inputs, tactic, **more)

    monkeypatch.setattr(PortableRunner, "compile", compile, raising=False)
    monkeypatch.setattr(PortableRunner, "forward", run)
    monkeypatch.setattr("moestro.tuning.measure.compile.os.cpu_count", lambda: 1)
    monkeypatch.setattr(tune, "AutoTuner", lambda store: AutoTuner(store, clock=lambda: now[0]))
    result = tune.run(spec(tiny, tmp_path, budget_s=18.0), "moestro tune")
    # those under way when the two thirds, and when the first size's half of the rest, were over
    assert len(compiled) - len(set(compiled)) <= 2
    assert before[0] <= 12 + 1 + 4  # at most four more of the first size
    assert {row.tokens for row in result.rows} >= {16}

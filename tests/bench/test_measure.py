"""Alternating rounds over contenders: with a simulated clock, so that nothing depends on time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moestro.bench.contenders import tactic_words
from moestro.bench.layers import Case
from moestro.bench.measure import Measured, Plan, measure_case, quartiles

CASE = Case(2, torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


@dataclass
class Fake:
    name: str
    value: float = 1.0
    format: str = "bf16"
    ours: bool = False
    nbytes: int = 10
    reason: str | None = None
    layers: int = 1
    error: Exception | None = None
    ran: list[int] = field(default_factory=list)

    def why_not(self, case: Case) -> str | None:
        return self.reason

    def calls(self, case: Case) -> Sequence[Callable[[], torch.Tensor]]:
        return [lambda index=index: self._run(index) for index in range(self.layers)]  # type: ignore[misc]

    def facts(self, case: Case) -> dict[str, Any]:
        return {}

    def _run(self, index: int) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.ran.append(index)
        return torch.full((2, 4), self.value)


@dataclass
class Clock:
    """Runs the call and gives a scripted time; interrupts at sample number `stop`."""

    order: list[str]
    contender: Fake
    stop: int | None = None
    name: str = "simulated"

    def prepare(self, call: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def sample() -> float:
            if self.stop is not None and len(self.order) >= self.stop:
                raise KeyboardInterrupt
            self.order.append(self.contender.name)
            call()
            return 1.0 + len(self.order) / 1000

        return sample


def run(contenders: list[Fake], rounds: int, stop: int | None = None) -> tuple[Any, list[str]]:
    order: list[str] = []
    plan = Plan(min_rounds=rounds, max_rounds=rounds, seconds=1e9)
    outcome = measure_case(contenders, CASE, lambda c: Clock(order, c, stop), plan)  # type: ignore[arg-type]
    return outcome, order


def test_rounds_take_one_sample_of_each_in_rotating_order() -> None:
    outcome, order = run([Fake("a"), Fake("b"), Fake("c")], rounds=3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [len(m.seconds) for m in outcome.measured] == [3, 3, 3]


def test_layers_are_taken_in_turn() -> None:
    fake = Fake("a", layers=3)
    run([fake], rounds=4)
    assert fake.ran == [0, 0, 1, 2, 0]  # the check, then one layer per round


def test_ctrl_c_keeps_whole_rounds() -> None:
    outcome, _ = run([Fake("a"), Fake("b")], rounds=9, stop=5)  # two rounds and a half
    assert outcome.interrupted
    assert {m.contender: len(m.seconds) for m in outcome.measured} == {"a": 2, "b": 2}


def test_what_cannot_run_is_skipped_with_its_reason() -> None:
    outcome, _ = run([Fake("a"), Fake("b", reason="no such chip")], rounds=2)
    assert outcome.skipped == {"b": "no such chip"}
    assert [m.contender for m in outcome.measured] == ["a"]


def test_what_raises_fails_alone() -> None:
    outcome, _ = run([Fake("a", error=RuntimeError("boom\nat line 3")), Fake("b")], rounds=2)
    assert outcome.failed == {"a": "RuntimeError: boom"}
    assert [m.contender for m in outcome.measured] == ["b"]


def test_a_bf16_contender_with_another_output_is_not_timed() -> None:
    outcome, _ = run(
        [Fake("a", value=1.0), Fake("b", value=1.1), Fake("c", value=1.1, format="nvfp4")], rounds=2
    )
    assert "differs from the first bf16 contender's by 0.1" in outcome.failed["b"]
    by_name = {m.contender: m.difference for m in outcome.measured}
    assert by_name["a"] is None
    assert by_name["c"] == pytest.approx(0.1, abs=1e-6)


def test_nan_output_is_not_timed() -> None:
    outcome, _ = run([Fake("a"), Fake("b", value=float("nan"))], rounds=2)
    assert "b" in outcome.failed


def test_no_contender_at_all_gives_an_empty_outcome() -> None:
    outcome, _ = run([Fake("a", reason="no")], rounds=2)
    assert outcome.measured == []


def test_median_and_quartiles() -> None:
    assert Measured("a", 1, (3.0, 1.0, 2.0), "x").median == 2.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)


def test_a_tactic_is_shown_by_the_knobs_that_are_turned() -> None:
    @dataclass(frozen=True)
    class Tactic:
        tile: int
        split: int = 1

    assert tactic_words(-1) == "default"
    assert tactic_words(Tactic(64)) == "tile=64"
    assert tactic_words(Tactic(64, split=2)) == "tile=64 split=2"
    assert tactic_words(("grouped", 4)) == "('grouped', 4)"


class Owner:
    """What a graph refers to: it must live as long as it is replayed."""


def test_calls_live_as_long_as_their_samplers_are_used() -> None:
    alive: list[bool] = []

    class Forgetful:
        """As a captured graph: runs without the call."""

        name = "graph"

        def prepare(self, call: Callable[[], torch.Tensor]) -> Callable[[], float]:
            watched = weakref.ref(call.owner)  # type: ignore[attr-defined]

            def sample() -> float:
                alive.append(watched() is not None)
                return 1.0

            return sample

    class Lends(Fake):
        def calls(self, case: Case) -> Sequence[Callable[[], torch.Tensor]]:
            def call() -> torch.Tensor:
                return torch.ones(2, 4)

            call.owner = Owner()  # type: ignore[attr-defined]
            return [call]

    plan = Plan(min_rounds=3, max_rounds=3, seconds=1e9)
    measure_case([Lends("a"), Lends("b")], CASE, lambda c: Forgetful(), plan)
    assert alive == [True] * 6


def test_who_differs_from_the_reference_is_not_timed() -> None:
    fakes = [Fake("a", format="nvfp4"), Fake("b", value=1.05, format="nvfp4")]
    plan = Plan(min_rounds=2, max_rounds=2, seconds=1e9)
    truth = torch.ones(2, 4)
    outcome = measure_case(
        fakes,
        CASE,
        lambda c: Clock([], c),  # type: ignore[arg-type]
        plan,
        truth=lambda contender, case: truth,
    )
    assert [(m.contender, m.error) for m in outcome.measured] == [("a", 0.0)]
    assert "differs from the float32 reference by 0.05" in outcome.failed["b"]


def test_other_peoples_code_may_raise_anything_but_a_defect_of_ours_is_not_hidden() -> None:
    outcome, _ = run([Fake("a", error=AssertionError("theirs")), Fake("b")], rounds=2)
    assert outcome.failed == {"a": "AssertionError: theirs"}
    with pytest.raises(AssertionError, match="ours"):
        run([Fake("c", error=AssertionError("ours"), ours=True)], rounds=2)


def test_a_first_call_that_was_slow_once_leaves_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # clock readings in pairs: the host time of each checked call of "fast", "once" (again) and "slow" (again)
    readings = iter([0.0, 0.001, 1.0, 10.0, 11.0, 11.001, 20.0, 29.0, 30.0, 39.0])
    monkeypatch.setattr("moestro.bench.measure.time.perf_counter", lambda: next(readings))
    contenders, order = [Fake("fast"), Fake("once"), Fake("slow")], []
    plan = Plan(min_rounds=1, max_rounds=1, seconds=0.0)
    outcome = measure_case(contenders, CASE, lambda c: Clock(order, c), plan)  # type: ignore[arg-type]
    assert [m.contender for m in outcome.measured] == ["fast", "once"]
    assert "one call takes 9.0 s" in outcome.skipped["slow"]

"""Which buckets are measured, in which order, where winners change, and for how long."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.tuning.measure.campaign import Campaign, spread

CROSSES_AT_2900 = {-1: 1.0, "a": lambda n: 0.1 if n <= 2900 else 0.3, "b": lambda n: 0.2}


def buckets(t: Any, runner: Any, cfg: Any) -> dict[int, Any]:
    """Every record, by bucket."""
    (book,) = t._known.books()
    return {record.bucket[0]: record for record in book.everything()}


def test_a_winner_that_changes_between_buckets_is_served_right_on_both_sides() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, CROSSES_AT_2900), config(), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(8192))
    pick = t.bind("op", [runner], cfg)
    for n, best in [
        (2048, "a"),
        (2600, "a"),
        (2800, "a"),
        (2990, "b"),
        (3300, "b"),
        (4096, "b"),
        (8000, "b"),
    ]:
        assert t.choose_one("op", [runner], cfg, inputs(n)) == pick(inputs(n)) == (runner, best), n


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("boundary", [2100, 2500, 2900, 3400, 3900])
def test_a_boundary_is_known_to_a_thirtieth_of_the_size(boundary: int, direction: str) -> None:
    clock = quiet_clock()
    times = {-1: 1.0, "a": lambda n: 0.1 if n <= boundary else 0.3, "b": lambda n: 0.2}
    coarse = (1, 2048, 4096)
    runner = Kernel(clock, times)
    cfg, t = config(coarse, lambda x: 4096 if direction == "up" and x > 2048 else 2048), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(4096))
    right = [
        t.choose_one("op", [runner], cfg, inputs(n))[1] == ("a" if n <= boundary else "b")
        for n in range(2048, 4097)
    ]
    assert right.count(False) <= 4096 // 32


def test_learned_points_are_stored_and_only_the_two_winners_and_the_default_race_for_them(
    store: Path,
) -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {**CROSSES_AT_2900, "never": 0.9})
    cfg, t = config(), tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(4096))
    learned = [record for record in buckets(t, runner, cfg).values() if record.learned]
    assert learned
    for record in learned:
        assert {c.tactic for c in record.evidence.candidates} == {-1, "a", "b"}
    fresh = tuner(clock, store)
    runs = len(runner._runs)
    with fresh.autotune(True):
        for n in (2600, 2800, 2990, 3300):
            expected = t.choose_one("op", [runner], cfg, inputs(n))
            assert fresh.choose_one("op", [runner], cfg, inputs(n)) == expected
    assert len(runner._runs) == runs


def test_between_buckets_with_the_same_winner_nothing_is_measured() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64, 1024, 4096)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(4096))
    assert runner.sizes == {64, 1024, 4096}


def test_the_search_can_be_left_out() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, CROSSES_AT_2900), config((64, 2048, 4096)), tuner(clock)
    with t.autotune(True, crossover=False):
        t.choose_one("op", [runner], cfg, inputs(4096))
    assert runner.sizes == {64, 2048, 4096}


def test_buckets_are_taken_from_coarse_to_fine_the_waiting_one_first() -> None:
    grid = [(n,) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    order = spread(grid, (32,))
    assert order[:4] == [(32,), (256,), (1,), (16,)]
    assert sorted(order) == grid
    assert spread([()], ()) == [()]
    assert spread([(7,)], (64,)) == [(7,)]


SLOW = {-1: 0.02, 0: 0.015, 1: lambda n: 0.01 + n * 1e-5, 2: 0.03, 3: 0.018}


@pytest.mark.parametrize("budget", [1.0, 2.5, 6.0])
def test_a_budget_is_kept_within_ten_percent_and_leaves_usable_decisions(budget: float) -> None:
    clock = quiet_clock(noise=0.02)
    runner, cfg, t = Kernel(clock, SLOW), config(), tuner(clock, max_rounds=2000)
    start = clock.now
    with t.autotune(True, budget_s=budget):
        t.choose_one("op", [runner], cfg, inputs(8192))
    assert clock.now - start <= budget * 1.1
    assert all(record.evidence.samples for record in buckets(t, runner, cfg).values())
    for n in (1, 100, 3000, 8192):
        decision = t.decision("op", [runner], cfg, inputs(n))
        assert decision is not None
        assert decision.status == "measured"
    assert t.choose_one("op", [runner], cfg, inputs(8192)) == (runner, 0), (
        "the bucket that waited comes first"
    )


def test_a_budget_is_one_for_all_calls_of_its_context() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, SLOW), config(), tuner(clock)
    with t.autotune(True, budget_s=2.0):
        start = clock.now
        for op in ("a", "b", "c", "d"):
            t.choose_one(op, [runner], cfg, inputs(4096))
        with t.autotune(True):
            t.choose_one("e", [runner], cfg, inputs(4096))
        assert clock.now - start <= 2.2
        with t.autotune(True, budget_s=1.0):
            t.choose_one("f", [runner], cfg, inputs(4096))
        assert clock.now - start <= 2.2, "a budget inside one that is spent is spent"
    assert t.decision("f", [runner], cfg, inputs(4096)) is None


def test_tuning_again_goes_on_where_it_stopped(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, SLOW), config()
    known: list[int] = []
    for _ in range(60):
        t = tuner(clock, store)
        with t.autotune(True, budget_s=2.0):
            t.choose_one("op", [runner], cfg, inputs(2048))
            (book,) = t._known.books()
            known.append(sum(record.complete for record in book.everything()))
    assert known == sorted(known)
    assert known[0] < known[-1]
    runs = len(runner._runs)
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(2048))
    assert len(runner._runs) == runs, "everything was finished in pieces"


def test_no_budget_at_all_measures_nothing() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, SLOW), tuner(clock)
    with t.autotune(True, budget_s=0):
        assert t.choose_one("op", [runner], config(), inputs(64)) == (runner, -1)
    assert runner._runs == []


def test_neighbouring_ties_go_to_the_neighbours_winner() -> None:
    clock = quiet_clock(noise=0.01)
    tied = {-1: 1e-3, **{k: 5e-4 * (1 + k * 1e-4) for k in range(6)}}
    runner, cfg, t = Kernel(clock, tied), config((8, 16, 32, 64, 128)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(128))
    assert len({record.tactic for record in buckets(t, runner, cfg).values()}) == 1


# --- what a decision was measured against ------------------------------------------------------------------
@pytest.mark.parametrize(("now", "again"), [("narrow", False), ("wide", True)])
def test_a_decision_is_measured_again_where_its_default_has_changed(
    store: Path, now: str, again: bool
) -> None:
    class Named(Kernel):
        def default_tactic(self, inputs: Any) -> str:
            return self._default

    clock = quiet_clock()
    cfg, runs = config((64,)), []
    for default in ("narrow", now):  # two processes
        runner, t = Named(clock, {-1: 2e-3, 0: 1e-3}), tuner(clock, store)
        runner._default = default
        with t.autotune(True):
            assert t.choose_one("op", [runner], cfg, inputs(64))[1] == 0
        runs.append(len(runner._runs))
        decision = t.decision("op", [runner], cfg, inputs(64))
        assert decision is not None
    assert (runs[1] > 0) is again


@pytest.mark.parametrize(("on_disk", "most"), [(False, 20), (True, 22)])
def test_tuning_one_bucket_enters_few_modules(
    store: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool, most: int
) -> None:
    """From a bucket's turn to its decision in memory; on disk, the store's and JSON's besides."""
    clock, entered = quiet_clock(), set()
    t, runner, cfg = (
        tuner(clock, store if on_disk else None),
        Kernel(clock, {-1: 2e-3, 0: 1e-3}),
        config((64,)),
    )
    whole = Campaign._measure

    def note(frame: Any, event: str, _: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("moestro.tuning") and not name.endswith("simulated"):
            entered.add(name)

    def watched(self: Campaign, *given: Any, **more: Any) -> Any:
        sys.setprofile(note)
        try:
            return whole(self, *given, **more)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Campaign, "_measure", watched)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    assert t.decision("op", [runner], cfg, inputs(64)) is not None
    assert len(entered) <= most, "\n".join(sorted(entered))

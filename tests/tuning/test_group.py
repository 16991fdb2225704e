"""One decision for a group of ranks: equal whatever differs, the default for all when one is lost, never a hang."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError, TuningWarning
from moestro.tuning import AutoTuner
from moestro.tuning.group import STRATEGIES
from moestro.tuning.link import StoreLink
from moestro.tuning.measure.simulated import SimulatedClock

TOGETHER = [name for name in STRATEGIES if name != "independent"]


def choose(
    link: StoreLink,
    times: dict[Any, Any],
    *,
    size: int = 4,
    store: Path | None = None,
    clock: SimulatedClock | None = None,
    kernel: type[Kernel] = Kernel,
    **context: Any,
) -> tuple[Any, AutoTuner, Kernel]:
    """Tune on paper in step with the other ranks: (tactic, tuner, kernel)."""
    clock = clock or quiet_clock(seed=link.rank)
    t, k = tuner(clock, store), kernel(clock, times)
    with t.autotune(True, group=link, **{"crossover": False, **context}):
        _, tactic = t.choose_one("op", [k], config((4,)), inputs(size))
    return tactic, t, k


# --- decisions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", TOGETHER)
def test_every_strategy_gives_one_decision_for_all_ranks(strategy: str) -> None:
    def body(link: StoreLink) -> Any:
        tactic, t, k = choose(link, {-1: 1e-3, 0: 5e-4, 1: 8e-4}, strategy=strategy)
        return tactic, t.decision("op", [k], config((4,)), inputs(4)).tactic  # type: ignore[union-attr]

    assert run_ranks(3, body) == [(0, 0)] * 3


@pytest.mark.parametrize("strategy", ["parallel", "merge"])
def test_the_slowest_ranks_time_counts(strategy: str) -> None:
    times = [{-1: 1e-3, 0: 4e-4, 1: 6e-4}, {-1: 1e-3, 0: 2e-3, 1: 6e-4}]
    found = run_ranks(2, lambda link: choose(link, times[link.rank], strategy=strategy)[0])
    assert found == [1, 1] if strategy == "parallel" else found[0] == found[1] != 0


def test_independent_ranks_decide_apart() -> None:
    times = [{-1: 1e-3, 0: 4e-4}, {-1: 1e-3, 1: 4e-4}]
    assert run_ranks(2, lambda link: choose(link, times[link.rank], strategy="independent")[0]) == [0, 1]


def test_decisions_are_equal_on_all_ranks_in_100_of_100_tunings() -> None:
    """Twelve tactics within half a percent: alone, ranks pick differently; together never."""

    def body(link: StoreLink, strategy: str, runs: int) -> Any:
        times = {-1: 1.1e-3} | {i: 1e-3 * (1 + 0.0004 * i) for i in range(12)}
        picks = []
        for run in range(runs):
            clock = SimulatedClock(seed=1000 * run + link.rank)
            t, k = tuner(clock, max_rounds=24), Kernel(clock, times)
            with t.autotune(True, group=link, strategy=strategy, crossover=False):
                picks.append(t.choose_one("op", [k], config((4,)), inputs(4))[1])
        return picks

    first, second = run_ranks(2, lambda link: body(link, "parallel", 100), wait_s=120)
    assert first == second
    assert len(first) == 100
    first, second = run_ranks(2, lambda link: body(link, "independent", 10), wait_s=120)
    assert first != second


def test_a_candidate_that_raises_on_one_rank_is_out_on_all() -> None:
    times = [{-1: 1e-3, 0: 3e-4, 1: 6e-4}, {-1: 1e-3, 0: RuntimeError("illegal instruction"), 1: 6e-4}]

    def body(link: StoreLink) -> Any:
        tactic, t, k = choose(link, times[link.rank])
        d = t.decision("op", [k], config((4,)), inputs(4))
        assert d is not None
        return tactic, next(c.reason for c in d.evidence.candidates if c.tactic == 0)

    for tactic, reason in run_ranks(2, body):
        assert tactic == 1
        assert "illegal instruction" in reason


def test_a_candidate_that_raises_on_one_rank_while_it_is_timed_is_out_on_all() -> None:
    def breaking(link: StoreLink) -> Callable[[int], Any]:
        runs = [0]

        def time_of(size: int) -> Any:
            runs[0] += 1
            return RuntimeError("late") if link.rank == 1 and runs[0] > 3 else 5.9e-4

        return time_of

    found = run_ranks(2, lambda link: choose(link, {-1: 1e-3, 0: breaking(link), 1: 6e-4})[0])
    assert found == [1, 1]


def test_a_tactic_that_one_rank_does_not_offer_is_out() -> None:
    times = [{-1: 1e-3, 0: 3e-4, 1: 6e-4}, {-1: 1e-3, 1: 6e-4}]
    assert run_ranks(2, lambda link: choose(link, times[link.rank])[0]) == [1, 1]


def test_a_bucket_that_one_rank_cannot_hold_is_left_out_on_all() -> None:
    big = MemoryError("out of memory")
    times = [{-1: 1e-3, 0: 5e-4}, {-1: lambda n: big if n > 8 else 1e-3, 0: lambda n: big if n > 8 else 5e-4}]

    def body(link: StoreLink) -> Any:
        clock = quiet_clock()
        t, k = tuner(clock), Kernel(clock, times[link.rank])
        with t.autotune(True, group=link, crossover=False):
            t.choose_one("op", [k], config((4, 16)), inputs(16))
        d = t.decision("op", [k], config((4, 16)), inputs(16))
        return d and (d.bucket, d.tactic)

    with pytest.warns(TuningWarning, match="does not fit into memory: rank 1"):
        assert run_ranks(2, body) == [(4, 0)] * 2


def test_ranks_called_with_different_sizes_tune_for_the_largest() -> None:
    def body(link: StoreLink) -> Any:
        clock = quiet_clock()
        t, k = tuner(clock), Kernel(clock, {-1: 1e-3, 0: 5e-4})
        with t.autotune(True, group=link, crossover=False):
            t.choose_one("op", [k], config(), inputs((3, 40)[link.rank]))
        return sorted(k.sizes)

    first, second = run_ranks(2, body)
    assert first == second
    assert 40 in first


def test_compiling_and_screening_are_shared_and_slow_candidates_run_on_one_rank_only() -> None:
    times = {-1: 1e-3} | dict.fromkeys(range(8), 0.005) | {8: 5e-4}

    def body(link: StoreLink) -> Any:
        tactic, _, k = choose(link, times)
        return tactic, {tactic for _, tactic in k._runs}

    (a, ran_a), (b, ran_b) = run_ranks(2, body)
    assert (a, b) == (8, 8)
    slow = set(range(8))
    assert ran_a & slow
    assert ran_b & slow
    assert not ran_a & ran_b & slow
    assert (ran_a | ran_b) & slow == slow


@pytest.mark.parametrize("strategy", TOGETHER)
def test_a_rank_whose_budget_ends_does_not_leave_the_others_waiting(strategy: str) -> None:
    def body(link: StoreLink) -> Any:
        times = {-1: 1e-3, 0: 9e-4, 1: 8.9e-4}
        budget = (1000.0, 0.05)[link.rank]
        clock = quiet_clock(seed=link.rank, noise=0.05)
        t, k = tuner(clock), Kernel(clock, times)
        picks = []
        with t.autotune(True, group=link, budget_s=budget, strategy=strategy):
            for size in (4, 64, 512):
                picks.append(t.choose_one("op", [k], config(), inputs(size))[1])
        return picks

    first, second = run_ranks(2, body)
    assert first == second


# --- stores ----------------------------------------------------------------------------------------------
def tuned_alone(store: Path, times: dict[Any, Any]) -> None:
    clock = quiet_clock()
    t, k = tuner(clock, store), Kernel(clock, times)
    with t.autotune(True, crossover=False):
        t.choose_one("op", [k], config((4,)), inputs(4))


def test_a_cold_rank_takes_what_a_warm_one_knows_without_measuring(tmp_path: Path) -> None:
    tuned_alone(tmp_path / "1", {-1: 1e-3, 0: 5e-4})

    def body(link: StoreLink) -> Any:
        tactic, _, k = choose(link, {-1: 1e-3, 0: 5e-4}, store=tmp_path / str(link.rank))
        return tactic, k._runs

    assert run_ranks(3, body) == [(0, [])] * 3
    for rank in range(3):  # and has it on its own disk
        clock = quiet_clock()
        t, k = tuner(clock, tmp_path / str(rank)), Kernel(clock, {-1: 1e-3, 0: 5e-4})
        assert t.choose_one("op", [k], config((4,)), inputs(4))[1] == 0


def test_ranks_whose_stores_differ_measure_again_together(tmp_path: Path) -> None:
    tuned_alone(tmp_path / "0", {-1: 1e-3, 0: 5e-4, 1: 7e-4})
    tuned_alone(tmp_path / "1", {-1: 1e-3, 0: 7e-4, 1: 5e-4})
    times = {-1: 1e-3, 0: 7e-4, 1: 5e-4}
    assert run_ranks(2, lambda link: choose(link, times, store=tmp_path / str(link.rank))[0]) == [1, 1]


def test_ranks_whose_stores_differ_vote_where_there_is_no_time_to_measure(tmp_path: Path) -> None:
    for rank, times in enumerate([{-1: 1e-3, 0: 7e-4, 1: 5e-4}, {-1: 1e-3, 0: 5e-4, 1: 7e-4}] * 2):
        tuned_alone(tmp_path / str(rank), times if rank != 3 else {-1: 1e-3, 0: 7e-4, 1: 5e-4})
    times = {-1: 1e-3, 0: 5e-4, 1: 5e-4}

    def body(link: StoreLink) -> Any:
        return choose(link, times, store=tmp_path / str(link.rank), budget_s=0.0)[0]

    assert run_ranks(4, body) == [1] * 4


# --- trouble ---------------------------------------------------------------------------------------------
def test_when_a_rank_is_lost_all_others_use_the_default_and_say_who_it_was() -> None:
    def body(link: StoreLink) -> Any:
        return None if link.rank == 2 else choose(link, {-1: 1e-3, 0: 5e-4})[0]

    with pytest.warns(TuningWarning, match=r"all use the default tactic: rank 2 of 3 did not come to 'tune'"):
        assert run_ranks(3, body, timeout_s=1.0) == [-1, -1, None]


def test_after_a_loss_the_context_goes_on_with_defaults_without_waiting_again() -> None:
    def body(link: StoreLink) -> Any:
        if link.rank == 1:
            return None
        clock = quiet_clock()
        t, k = tuner(clock), Kernel(clock, {-1: 1e-3, 0: 5e-4})
        with t.autotune(True, group=link):
            return [t.choose_one("op", [k], config(), inputs(n))[1] for n in (4, 8, 16)]

    started = time.monotonic()
    with pytest.warns(TuningWarning):
        assert run_ranks(2, body, timeout_s=3.0)[0] == [-1] * 3
    assert time.monotonic() - started < 8.5, "three waits would take 9 s, one takes 3"


def test_a_rank_that_leaves_the_context_with_an_error_frees_the_others_at_once() -> None:
    def body(link: StoreLink) -> Any:
        t, k = tuner(quiet_clock()), Kernel(quiet_clock(), {-1: 1e-3, 0: 5e-4})
        with t.autotune(True, group=link):
            if link.rank == 0:
                raise KeyError("weights")
            return t.choose_one("op", [k], config(), inputs(4))[1]

    with pytest.warns(TuningWarning, match="rank 0 left: KeyError"):
        error, tactic = run_ranks(2, body, timeout_s=60.0)
    assert isinstance(error, KeyError)
    assert tactic == -1


def test_ranks_that_tune_different_operations_are_told_so() -> None:
    def body(link: StoreLink) -> Any:
        t, k = tuner(quiet_clock()), Kernel(quiet_clock(), {-1: 1e-3, 0: 5e-4})
        with t.autotune(True, group=link):
            t.choose_one(f"op{link.rank}", [k], config(), inputs(4))

    for error in run_ranks(2, body):
        assert isinstance(error, TuningError)
        assert "op must be the same on all ranks" in str(error)
        assert "op0" in str(error)
        assert "op1" in str(error)


def test_wrong_settings_are_named() -> None:
    t = tuner(quiet_clock())
    with (
        pytest.raises(TuningError, match=r"unknown strategy 'paralel'.*did you mean 'parallel'"),
        t.autotune(True, group=StoreLink(dist.HashStore(), 0, 1), strategy="paralel"),
    ):
        pass
    with (
        pytest.raises(TuningError, match=r"group must be a torch.distributed.ProcessGroup, got str"),
        t.autotune(True, group="world"),
    ):
        pass
    with pytest.raises(TuningError, match="without a group"), t.autotune(True, strategy="merge"):
        pass


class Killed(BaseException):
    """What takes a rank away in the middle of a measurement."""


TROUBLES = ("none", "slow", "dead", "killed", "cold", "differs", "raises", "budget")


def troubled(link: StoreLink, trouble: str, victim: int, root: Path, seed: int) -> Any:
    """One rank's tuning, with something wrong on the victim."""
    here = link.rank == victim
    times: dict[Any, Any] = {-1: 1e-3, 0: 5e-4, 1: 7e-4, 2: 6e-4}
    runs = [0]

    def fatal(size: int) -> float:
        runs[0] += 1
        if runs[0] > seed % 9:
            raise Killed
        return 5e-4

    if here and trouble == "dead":
        return "gone"
    if here and trouble == "raises":
        times[seed % 3] = RuntimeError("broken here")
    if here and trouble == "killed":
        times[0] = fatal
        link.leave = lambda why: None  # type: ignore[method-assign]
    if here and trouble == "slow":
        time.sleep(0.5)
    store = root / str(link.rank)
    if (trouble == "cold" and not here) or (trouble == "differs"):
        tuned_alone(store, times if not here else {-1: 1e-3, 0: 9e-4, 1: 5e-4, 2: 8e-4})
    try:
        budget = 0.01 if here and trouble == "budget" else None
        return choose(
            link, times, store=store, budget_s=budget, strategy=random.Random(seed).choice(TOGETHER)
        )[0]
    except Killed:
        return "gone"


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_to_a_rank_the_others_end_with_one_answer(seed: int, tmp_path: Path) -> None:
    r = random.Random(seed)
    size = r.choice([2, 3, 4])
    trouble, victim = TROUBLES[seed % len(TROUBLES)], r.randrange(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        found = run_ranks(size, lambda link: troubled(link, trouble, victim, tmp_path, seed), timeout_s=0.3)
    left = [answer for answer in found if answer != "gone"]
    assert len(set(map(str, left))) == 1, found
    assert left[0] in (-1, 0, 1, 2)
    if trouble in ("slow", "dead", "killed"):
        assert left[0] == -1 or (trouble == "killed" and "gone" not in found)

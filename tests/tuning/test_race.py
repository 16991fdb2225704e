"""The race: who stays, who leaves and why, and how often it is right. Simulated clocks and fixed seeds."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import TuningError
from moestro.tuning.measure.simulated import SimulatedClock
from moestro.tuning.race.race import RaceResult, race
from moestro.tuning.spec.policy import MeasurementPolicy

QUIET = {"noise": 0.0, "drift": 0.0, "outliers": 0.0}


def run(
    times: Sequence[float], seed: int = 0, clock: SimulatedClock | None = None, **more: object
) -> RaceResult:
    clock = clock or SimulatedClock(seed=seed)
    return race([clock.sampler(t * 1e-3) for t in times], seed=seed, **more)  # type: ignore[arg-type]


def quiet(times: Sequence[float], **more: object) -> RaceResult:
    return run(times, clock=SimulatedClock(**QUIET), **more)  # type: ignore[arg-type]


# --- how often it is right ---
def test_the_best_of_sixteen_is_picked_under_noise_drift_and_outliers_at_a_fraction_of_equal_sampling() -> (
    None
):
    times = [1 + 0.01 * i for i in range(16)]
    results = [run(times, seed, default=15) for seed in range(200)]
    assert sum(r.winner == 0 for r in results) >= 198
    # 48 rounds of all 16 are what equal sampling by the same statistic needs to be right in 99 %.
    assert sum(r.samples for r in results) / len(results) < 0.35 * 48 * 16


def test_tactics_within_half_a_percent_are_a_tie_that_the_first_listed_wins() -> None:
    times = [1 + 0.005 * i / 11 for i in range(12)]
    picks = Counter(run([*times, 1.1], seed, default=12).winner for seed in range(100))
    assert picks[0] >= 95
    picks = Counter(run([1.005, 1.0, 1.1], seed, default=2).winner for seed in range(100))
    assert picks[0] >= 90


def test_a_default_within_min_gain_of_the_best_is_kept() -> None:
    assert all(run([1.02, 1.0], seed).winner == 0 for seed in range(100))
    assert all(run([1.01, *[1.0] * 5], seed).winner == 0 for seed in range(50))


def test_a_default_beyond_min_gain_is_replaced() -> None:
    assert sum(run([1.035, 1.0], seed).winner == 1 for seed in range(50)) >= 49


def test_no_pick_is_slower_than_the_default_even_on_a_very_noisy_machine() -> None:
    times = [1.0, *(1 + 0.0025 * i for i in range(1, 12))]
    for seed in range(60):
        assert run(times, clock=SimulatedClock(noise=0.08, outliers=0.05, seed=seed), seed=seed).winner == 0


def test_a_race_is_repeated_exactly_by_its_seed() -> None:
    times = [1.0, 1.003, 1.006, 1.1]
    assert run(times, 3).candidates == run(times, 3).candidates
    assert run(times, 3).samples != run(times, 4).samples


# --- rules, without noise ---
def test_without_noise_the_fastest_wins_and_each_loser_has_its_reason() -> None:
    result = quiet([1.1, 1.05, 1.0, 2.0])
    assert (result.winner, result.ended) == (2, "decided")
    assert [c.reason for c in result.candidates] == ["default beaten", "slower", "won", "screened"]
    assert [pytest.approx(r) for r in (1.0, 1.05 / 1.1, 1 / 1.1, 2 / 1.1)] == [
        c.ratio for c in result.candidates
    ]
    assert result.noise_floor < 1e-3


def test_ties_go_to_the_default_then_the_preferred_then_the_first() -> None:
    assert quiet([1.0, 1.0, 1.0], default=1).winner == 1
    assert quiet([1.0, 1.0, 1.0, 1.2], default=3).winner == 0
    assert quiet([1.0, 1.0, 1.0, 1.2], default=3, preferred=2).winner == 2
    assert quiet([1.0, 1.0, 1.02, 1.2], default=3, preferred=2).winner == 0


def test_who_is_not_better_than_the_default_by_min_gain_never_wins_a_tie() -> None:
    """1.7 % better and tied with 2.4 % better: only the latter may replace the default."""
    assert quiet([1.024, 1.0065, 1.0]).winner == 2


@given(
    st.lists(st.floats(0.5, 2.0), min_size=1, max_size=8),
    st.integers(0, 7),
    st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_on_a_quiet_clock_the_pick_is_never_slower_than_the_default_nor_far_from_the_best(
    times: list[float], default: int, seed: int
) -> None:
    default %= len(times)
    result = quiet(times, default=default, seed=seed, policy=MeasurementPolicy(max_rounds=40))
    picked = times[result.winner]
    assert picked <= times[default]
    assert picked <= min(times) * 1.0205 * 1.005


def test_the_incumbent_runs_twice_a_round_and_nobody_else_does() -> None:
    log: list[int] = []

    def sampler(i: int) -> Callable[[], float]:
        return lambda: log.append(i) or 1.0  # type: ignore[func-returns-value]

    race([sampler(i) for i in range(3)], MeasurementPolicy(min_rounds=3, max_rounds=4, tie=0.5))
    assert {0, 1, 2} == set(log[:3])
    assert Counter({0: 2, 1: 1, 2: 1}) == Counter(log[3:7])
    assert log[3:7] != log[7:11]  # rotated


def test_slow_drift_of_a_third_does_not_hide_a_difference_of_three_percent() -> None:
    for seed in range(20):
        clock = SimulatedClock(drift=0.3, drift_period=0.5, noise=0.01, seed=seed)
        assert run([1.2, 1.03, 1.0], clock=clock, seed=seed).winner == 2


# --- failures and ends ---
def failing(after: int, seconds: float = 1e-3) -> Callable[[], float]:
    left = iter(range(after))

    def sample() -> float:
        if next(left, None) is None:
            raise ValueError("illegal memory access")
        return seconds

    return sample


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_candidate_that_raises_leaves_with_its_reason_and_the_race_goes_on(after: int) -> None:
    good = SimulatedClock(**QUIET).sampler
    result = race([good(1.2e-3), failing(after), good(1e-3)])
    assert result.winner == 2
    assert result.candidates[1].reason == "failed: ValueError: illegal memory access"
    assert result.candidates[1].samples == after


def test_a_default_that_raises_leaves_the_others_to_race_without_ratios() -> None:
    good = SimulatedClock(**QUIET).sampler
    result = race([failing(0), good(1.2e-3), good(1e-3)])
    assert result.winner == 2
    assert [c.ratio for c in result.candidates] == [None] * 3


def test_when_every_candidate_fails_the_error_holds_their_reasons() -> None:
    with pytest.raises(TuningError, match=r"no candidate is left: 0: failed: ValueError: .*; 1: failed"):
        race([failing(0), failing(0)])


@pytest.mark.parametrize("reading", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_that_reads_nonsense_is_a_failure_not_a_winner(reading: float) -> None:
    result = race([lambda: 1.0, lambda: reading])
    assert result.winner == 0
    assert result.candidates[1].reason.startswith("failed: ClockError: the clock read [")


def test_stop_ends_after_the_round_and_keeps_an_unbeaten_default() -> None:
    calls = iter([False, True, True])
    result = run([1.01, 1.0], stop=lambda: next(calls))
    assert (result.ended, result.rounds, result.winner) == ("budget", 2, 0)


def test_abort_ends_within_the_round_and_discards_it() -> None:
    clock = SimulatedClock(**QUIET)
    result = run([1.0] * 10, clock=clock, abort=lambda: clock.runs >= 13)
    assert (result.ended, result.rounds, result.samples) == ("budget", 1, 13)


def test_max_seconds_ends_a_race_by_its_clock() -> None:
    now = iter(range(1000))
    samplers = [SimulatedClock(seed=1).sampler(1.0), SimulatedClock(seed=2).sampler(1.0)]
    result = race(samplers, MeasurementPolicy(max_seconds=5), clock=lambda: float(next(now)))
    assert result.ended == "time"
    assert result.rounds < 8


def test_max_rounds_ends_an_undecidable_race_in_favour_of_the_order() -> None:
    policy = MeasurementPolicy(max_rounds=10)
    result = run([1.2, 1.0, 1.0], policy=policy, clock=SimulatedClock(noise=0.05, outliers=0))
    assert (result.ended, result.rounds) == ("rounds", 10)


@pytest.mark.parametrize(
    ("samplers", "more", "message"),
    [
        ([], {}, "at least one candidate"),
        ([[]], {}, r"the same number of probes .* got \[0\]"),
        ([[float], [float, float]], {}, r"got \[1, 2\]"),
        ([float], {"default": 1}, "default: expected an index below 1, got 1"),
        ([float], {"preferred": -1}, "preferred: expected an index below 1, got -1"),
    ],
)
def test_wrong_arguments_are_named(samplers: list[object], more: dict[str, int], message: str) -> None:
    with pytest.raises(TuningError, match=message):
        race(samplers, **more)  # type: ignore[arg-type]


# --- probes and ranks ---
def probes(clock: SimulatedClock, times: Sequence[Sequence[float]]) -> list[list[Callable[[], float]]]:
    return [[clock.sampler(t * 1e-3) for t in row] for row in times]


def test_over_probes_the_smallest_worst_ratio_wins() -> None:
    times = [(1.0, 1.0), (0.5, 0.98), (0.9, 0.9), (0.98, 0.5)]
    for seed in range(20):
        result = race(probes(SimulatedClock(seed=seed), times), seed=seed, probes=("a", "b"))
        assert result.winner == 2
    ratios = [each["ratio"] for each in result.candidates[2].probes.values()]
    assert ratios == pytest.approx([0.9, 0.9], rel=0.02)
    assert result.candidates[1].ratio == pytest.approx(0.98, rel=0.05)


def test_over_probes_the_default_is_measured_to_the_end_since_all_ratios_are_to_it() -> None:
    times = [(1.3, 1.5), (1.0, 1.0), (1.001, 1.001)]
    result = race(probes(SimulatedClock(seed=3), times))
    beaten = result.candidates[0]
    assert beaten.reason == "default beaten"
    assert result.left_at[0] is not None
    assert result.left_at[0] < result.rounds
    assert beaten.samples >= 2 * result.rounds


def test_better_on_one_probe_and_worse_on_another_does_not_replace_the_default() -> None:
    for seed in range(20):
        result = race(probes(SimulatedClock(seed=seed), [(1.0, 1.0), (0.7, 1.01)]), seed=seed)
        assert result.winner == 0


def test_ranks_that_share_their_times_take_the_same_steps_by_the_slowest_rank() -> None:
    """Rank 1 finds candidate 1 slow and cannot run candidate 2; rank 0 must learn of both."""
    own = [[1.2, 1.0, 0.5, 1.1], [1.2, 1.4, math.inf, 1.1]]
    clocks = [SimulatedClock(seed=1), SimulatedClock(seed=2)]

    barrier, slots = threading.Barrier(2), [[], []]  # type: ignore[var-annotated]
    results: list[RaceResult | None] = [None, None]

    def rank(r: int) -> None:
        def combine(flat: list[float]) -> list[float]:
            slots[r] = flat
            barrier.wait(100)
            shared = [max(pair) for pair in zip(*slots, strict=True)]
            barrier.wait(100)
            return shared

        samplers = [failing(0) if math.isinf(t) else clocks[r].sampler(t * 1e-3) for t in own[r]]
        results[r] = race(samplers, combine=combine)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert results[0] is not None
    assert results[1] is not None
    assert [r.winner for r in results if r] == [3, 3]
    assert results[0].rounds == results[1].rounds
    assert results[0].candidates[2].reason == "failed on another rank"
    assert results[1].candidates[2].reason.startswith("failed: ValueError")


# --- evidence ---
def test_the_interval_of_the_ratio_holds_the_true_ratio() -> None:
    missed = 0
    for seed in range(200):
        found = run([1.05, 1.0], seed).candidates[1]
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 1 / 1.05 <= found.high
    assert missed <= 10  # 95 %


def test_evidence_counts_every_run_and_gives_seconds_and_spread() -> None:
    clock = SimulatedClock(noise=0.02, drift=0.0, outliers=0.0, seed=5)
    result = run([1.004, 1.0, 1.3], clock=clock)
    assert clock.runs == result.samples == sum(c.samples for c in result.candidates)
    for candidate, time in zip(result.candidates, (1.004e-3, 1e-3, 1.3e-3), strict=True):
        assert candidate.median == pytest.approx(time, rel=0.03)
    assert result.candidates[0].spread == pytest.approx(0.02 * 1.004e-3, rel=0.6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("confidence", 1.0), ("min_gain", -0.1), ("resolution", 0.0), ("max_rounds", 2), ("screen_ratio", 1.0)],
)
def test_a_policy_without_sense_is_an_error_that_names_the_field(field: str, value: float) -> None:
    with pytest.raises(TuningError, match=rf"MeasurementPolicy.{field} must be .*, got {value}"):
        MeasurementPolicy(**{field: value})  # type: ignore[arg-type]

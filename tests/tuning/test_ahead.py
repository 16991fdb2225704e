"""A tuning ahead of calls: its budget is for all sizes, not for the largest alone."""

from __future__ import annotations

from typing import Any

from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
# As on an H200: the large tile is the best from 4096 on and takes twice the default's time at the smallest sizes.
AS_ON_A_GPU = {
    -1: lambda n: 2e-5 + n * 6e-7,
    "large": lambda n: 4e-5 + n * 4e-7 if n >= 1024 else 4e-5 + n * 7e-7,
    "small": lambda n: 1.5e-5 + n * 5.5e-7 if n <= 64 else 1.5e-5 + n * 9e-7,
    **{k: (lambda n, k=k: 2e-5 + n * (6 + k) * 1e-7) for k in range(1, 9)},
}


def tuned_for(seconds: float, ahead: bool) -> tuple[Any, Kernel, Any]:
    """(tuner, runner, configuration) after a tuning of SIZES for so many seconds, the largest first."""
    clock = quiet_clock(noise=0.02)
    runner, cfg, t = Kernel(clock, AS_ON_A_GPU), config(), tuner(clock)
    with t.autotune(
        True, budget_s=seconds, tuning_buckets=SIZES, round_up=True, crossover=False, ahead=ahead
    ):
        t.choose_one("op", [runner], cfg, inputs(16384))
    return t, runner, cfg


def slower_than_untuned(tuned: tuple[Any, Kernel, Any]) -> list[int]:
    """Sizes at which what serves takes longer than the default."""
    t, runner, cfg = tuned
    served = {n: t.choose_one("op", [runner], cfg, inputs(n))[1] for n in SIZES}
    return [n for n, tactic in served.items() if AS_ON_A_GPU[tactic](n) > AS_ON_A_GPU[-1](n)]


def test_the_largest_size_does_not_take_the_budget_of_the_others() -> None:
    """A budget for about one size: where a call waits, it is its own, and then serves the smallest, too."""
    assert slower_than_untuned(tuned_for(0.15, ahead=False)) != []
    assert slower_than_untuned(tuned_for(0.15, ahead=True)) == []


def test_a_call_that_waits_still_has_its_own_size_measured_whole() -> None:
    t, runner, cfg = tuned_for(0.2, ahead=False)
    assert t.choose_one("op", [runner], cfg, inputs(16384)) == (runner, "large")


def test_short_tunings_of_long_calls_add_up_to_all_sizes() -> None:
    """Calls of a second, ten seconds a tuning, of which a size may take half: the next goes on with what one left."""
    clock = quiet_clock(noise=0.02)
    runner, cfg, t = Kernel(clock, {-1: 1.0, 0: 0.8}), config(), tuner(clock)
    samples, whole = [], []
    for _ in range(12):
        with t.autotune(
            True, budget_s=10.0, tuning_buckets=SIZES, round_up=True, crossover=False, ahead=True
        ):
            t.choose_one("op", [runner], cfg, inputs(16384))
        (book,) = t._known.books()
        samples.append(sum(record.evidence.samples for record in book.everything()))
        whole.append(sum(record.complete for record in book.everything()))
    assert samples == sorted(set(samples)), "every tuning adds something"
    assert whole == sorted(whole)
    assert whole[-1] == len(SIZES)

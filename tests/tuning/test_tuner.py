"""Choosing, by look-up and by tuning, on simulated kernels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tuning_fakes import FAST_LATER, Fake, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningWarning
from moestro.tuning import (
    DynamicTensorSpec,
    Probe,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    is_in_profile_measurement,
    make_bucket_mapper,
    map_to_hybrid_bucket_uncapped,
    next_positive_power_of_2,
)


def test_untuned_the_default_serves_and_nothing_is_known() -> None:
    clock = quiet_clock()
    runner = Kernel(clock, FAST_LATER)
    t = tuner(clock)
    assert t.choose_one("op", [runner], config(), inputs(100)) == (runner, -1)
    assert t.decision("op", [runner], config(), inputs(100)) is None
    assert runner._runs == []


def test_a_tuned_size_serves_the_fastest_tactic_and_says_why() -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, FAST_LATER), config()
    t = tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    decision = t.decision("op", [runner], cfg, inputs(64))
    assert decision is not None
    assert (decision.runner, decision.tactic, decision.bucket, decision.status) == (runner, 0, 64, "measured")
    best = decision.evidence.of(decision.record.runner, 0)
    assert best is not None
    assert best.fate == "winner"
    assert best.ratio == pytest.approx(0.064, rel=0.02)
    assert decision.evidence.noise_floor < 0.02
    assert decision.evidence.clock == "simulated"


@pytest.mark.parametrize("bound", [False, True])
def test_a_size_beyond_everything_tuned_gets_the_nearest_decision_and_one_warning(
    bound: bool, store: Path
) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, FAST_LATER), config()
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(1024))
    pick = t.bind("op", [runner], cfg)

    def choose(n: int) -> Any:
        return pick(inputs(n)) if bound else t.choose_one("op", [runner], cfg, inputs(n))

    with pytest.warns(TuningWarning, match=r"3000.*1024") as caught:
        assert choose(3000) == (runner, 1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (3000, 2900, 4000, 1024, 3000):
            assert choose(n) == (runner, 1)
    decision = t.decision("op", [runner], cfg, inputs(3000))
    assert decision is not None
    assert (decision.bucket, decision.status) == (1024, "extrapolated")


GENERATORS: dict[str, Any] = {
    "hybrid": get_hybrid_num_tokens_buckets,
    "powers": lambda n: [1 << k for k in range(next_positive_power_of_2(n).bit_length())],
    "every 100": lambda n: range(100, n + 100, 100),
    "few": (64, 1024, 4096),
    "one": lambda n: [n],
    "descending list": lambda n: [n, max(1, n // 2), 1],
}
MAPS: dict[str, Any] = {
    "hybrid": map_to_hybrid_bucket_uncapped,
    "identity": lambda x: x,
    "down": make_bucket_mapper((64, 1024, 4096)),
    "up": make_bucket_mapper((64, 1024, 4096), round_up=True),
    "power": next_positive_power_of_2,
    "hundreds down": lambda x: max(1, x // 100 * 100),
    "all one": lambda x: 1,
}


@pytest.mark.parametrize("round_up", [None, False, True])
@pytest.mark.parametrize("to_bucket", MAPS)
@pytest.mark.parametrize("gen", GENERATORS)
def test_after_tuning_at_a_size_every_size_up_to_it_hits(
    gen: str, to_bucket: str, round_up: bool | None
) -> None:
    clock = quiet_clock(noise=0.0)
    runner = Kernel(clock, {-1: 1e-3, 0: 5e-4})
    cfg, t = config(GENERATORS[gen], MAPS[to_bucket]), tuner(clock, max_rounds=4)
    with t.autotune(True, round_up=round_up):
        t.choose_one("op", [runner], cfg, inputs(2500))
    with t.autotune(False, round_up=round_up), warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in [*range(1, 140), *range(140, 2501, 37), 2499, 2500]:
            assert t.choose_one("op", [runner], cfg, inputs(n)) == (runner, 0)
            decision = t.decision("op", [runner], cfg, inputs(n))
            assert decision is not None
            assert decision.status == "measured"
            assert decision.bucket in runner.sizes


@settings(deadline=None, max_examples=60)
@example([1, 127], 1, 2, "down")  # up below the map's first bucket, down above it
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=8),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from(sorted(MAPS)),
)
def test_a_measured_bucket_in_the_maps_direction_serves(
    buckets: list[int], seen: int, size: int, to_bucket: str
) -> None:
    clock = quiet_clock(noise=0.0)
    runner = Kernel(clock, {-1: 1e-3, 0: 5e-4})
    cfg, t = config(tuple(buckets), MAPS[to_bucket]), tuner(clock, max_rounds=4)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(seen))
    decision = t.decision("op", [runner], cfg, inputs(size))
    assert decision is not None
    mapped = MAPS[to_bucket](size)
    up, down = [b for b in buckets if b >= size], [b for b in buckets if b <= size]
    if mapped > size:
        assert decision.bucket == (min(up) if up else max(buckets))
    elif mapped < size:
        assert decision.bucket == (max(down) if down else min(buckets))
    elif size in buckets:
        assert decision.bucket == size
    assert (decision.status == "extrapolated") == (size > max(*buckets, seen))


def test_buckets_follow_the_size_seen() -> None:
    clock = quiet_clock()
    asked: list[int] = []

    def generate(n: int) -> tuple[int, ...]:
        asked.append(n)
        return get_hybrid_num_tokens_buckets(n)

    runner, cfg, t = Kernel(clock, FAST_LATER), config(generate), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(100))
        assert max(runner.sizes) == 100
        t.choose_one("op", [runner], cfg, inputs(16384))
    assert max(runner.sizes) == 16384
    assert set(asked) == {100, 16384}


def test_tuning_again_at_a_known_size_measures_nothing() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, FAST_LATER), config(), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(1000))
        runs = len(runner._runs)
        for n in (1000, 999, 512, 1):
            t.choose_one("op", [runner], cfg, inputs(n))
    assert len(runner._runs) == runs


def test_the_winner_among_runners_belongs_to_the_runner_set() -> None:
    clock = quiet_clock()
    a, b = Kernel(clock, {-1: 1e-3, 0: 8e-4}, name="a"), Kernel(clock, {-1: 1e-3, 0: 4e-4}, name="b")
    cfg, t = config((64,)), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [a, b], cfg, inputs(64)) == (b, 0)
        assert t.choose_one("op", [a], cfg, inputs(64)) == (a, 0)
    assert t.choose_one("op", [a, b], cfg, inputs(64)) == (b, 0)
    assert t.choose_one("op", [a], cfg, inputs(64)) == (a, 0)


def test_a_default_that_is_as_good_is_kept() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, {-1: 1e-3, 0: 0.99e-3, 1: 1.5e-3}), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], config((64,)), inputs(64)) == (runner, -1)


def test_bind_and_choose_one_agree_before_and_after_new_decisions() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, FAST_LATER), config(), tuner(clock)
    pick = t.bind("op", [runner], cfg)
    assert pick(inputs(400)) == pick(inputs(400)) == (runner, -1)
    with t.autotune(True):
        assert pick(inputs(2000)) == (runner, 1)
    for n in (1, 300, 480, 520, 1999):
        assert pick(inputs(n)) == t.choose_one("op", [runner], cfg, inputs(n)) == (runner, int(n > 500))
    with t.autotune(True):
        pick(inputs(10_000))
    assert pick(inputs(9000)) == (runner, 1)


def test_a_bound_handle_notices_another_dtype() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64,)), tuner(clock)
    pick = t.bind("op", [runner], cfg)
    with t.autotune(True):
        pick(inputs(64))
    assert pick(inputs(64)) == (runner, 0)
    half = [Fake((64, 64), "float16"), Fake((64, 64))]
    assert pick(half) == (runner, -1)
    assert pick(inputs(64)) == (runner, 0)


def test_two_dynamic_sizes_are_tuned_on_their_grid() -> None:
    clock = quiet_clock()

    class Two(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            rows, columns = inputs[0].shape
            self._runs.append(((rows, columns), tactic))  # type: ignore[arg-type]
            clock.advance({-1: 1e-3, 0: rows * 1e-5, 1: columns * 1e-5}[tactic])

    runner, t = Two(clock, {-1: 0, 0: 0, 1: 0}), tuner(clock)
    specs = tuple(
        DynamicTensorSpec(0, dim, (16, 64), make_bucket_mapper((16, 64), round_up=True)) for dim in (0, 1)
    )
    cfg = TuningConfig(dynamic_tensor_specs=specs)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, [Fake((64, 64))])
    assert {size for size, _ in runner._runs} == {(16, 16), (16, 64), (64, 16), (64, 64)}
    for _ in range(2):
        assert t.choose_one("op", [runner], cfg, [Fake((10, 50))]) == (runner, 0)
        assert t.choose_one("op", [runner], cfg, [Fake((50, 10))]) == (runner, 1)
    decision = t.decision("op", [runner], cfg, [Fake((10, 50))])
    assert decision is not None
    assert decision.bucket == (16, 64)


def test_no_dynamic_size_is_one_decision() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), TuningConfig(), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(7))
    assert t.choose_one("op", [runner], cfg, inputs(7)) == (runner, 0)
    assert t.bind("op", [runner], cfg)(inputs(7)) == (runner, 0)
    assert t.choose_one("op", [runner], cfg, inputs(8)) == (runner, -1)


def test_several_probes_give_the_smallest_worst_case() -> None:
    clock = quiet_clock()

    class Skewed(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            skew = inputs[0].dtype == "skewed"
            clock.advance({-1: 1.0, "fair": 1.2 if skew else 0.5, "both": 0.8}[tactic] * 1e-3)

    probes = (
        Probe("flat", lambda inputs, profile, seed: inputs),
        Probe("skew", lambda inputs, profile, seed: [_Skewed(inputs[0]), *inputs[1:]]),
    )
    runner, t = Skewed(clock, {-1: 0, "fair": 0, "both": 0}), tuner(clock)
    cfg = config((64,), probes=probes[:1])
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, "fair")
        with t.autotune(True, probes=probes):
            assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, "both")
            decision = t.decision("op", [runner], cfg, inputs(64))
    assert decision is not None
    chosen = decision.evidence.of(decision.record.runner, "both")
    assert chosen is not None
    assert set(chosen.probes) == {"flat", "skew"}
    assert chosen.ratio == pytest.approx(0.8, rel=0.02)
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, "fair"), "its own probes come first"


class _Skewed(Fake):
    def __init__(self, like: Fake) -> None:
        super().__init__(like.shape, like.dtype, like.device)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __getattribute__(self, name: str) -> Any:
        if name == "dtype":
            return _SkewedDtype("float32")
        return super().__getattribute__(name)


class _SkewedDtype(str):
    def __eq__(self, other: object) -> bool:
        return other == "skewed" or str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def test_serving_finds_what_was_tuned_with_other_probes() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64,)), tuner(clock)
    with t.autotune(True, probes=[Probe("zipf", lambda inputs, profile, seed: inputs)]):
        t.choose_one("op", [runner], cfg, inputs(64))
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    decision = t.decision("op", [runner], cfg, inputs(64))
    assert decision is not None
    assert decision.record.probes == ("zipf",)


def test_the_measurement_scope_is_on_in_timed_runs_only() -> None:
    clock = quiet_clock()
    seen: dict[str, set[bool]] = {"preparation": set(), "tactics": set(), "runs": set(), "after": set()}

    class Watching(Kernel):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> Any:
            seen["tactics"].add(is_in_profile_measurement())
            return [0]

        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            seen["preparation" if do_preparation else "runs"].add(is_in_profile_measurement())
            clock.advance(1e-3)

    t = tuner(clock, verify=False)
    with t.autotune(True):
        runner, tactic = t.choose_one("op", [Watching(clock, {})], config((64,)), inputs(64))
        assert seen == {"preparation": {False}, "tactics": {False}, "runs": {True}, "after": set()}
        runner(inputs(64), tactic=tactic)
    assert seen["runs"] == {True, False}

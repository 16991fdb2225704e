"""A tuning that has not finished: what it measured answers near by, the default elsewhere, and the budget is shared."""

from __future__ import annotations

import contextlib
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningWarning
from moestro.tuning import (
    DynamicTensorSpec,
    TuningConfig,
    make_bucket_mapper,
    map_to_hybrid_bucket_uncapped,
)
from moestro.tuning.lookup.decisions import DecisionsOfKey
from moestro.tuning.lookup.table import make_table, roundings
from moestro.tuning.show.families import families
from moestro.tuning.spec.evidence import Evidence, Record, finished_for
from moestro.tuning.spec.keys import static_key
from moestro.tuning.store.store import Store

SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
# As on an H200: the large tile is the best from 4096 on and takes twice the default's time at the smallest sizes.
AS_ON_A_GPU = {
    -1: lambda n: 2e-5 + n * 6e-7,
    "large": lambda n: 4e-5 + n * 4e-7 if n >= 1024 else 4e-5 + n * 7e-7,
    "small": lambda n: 1.5e-5 + n * 5.5e-7 if n <= 64 else 1.5e-5 + n * 9e-7,
    **{k: (lambda n, k=k: 2e-5 + n * (6 + k) * 1e-7) for k in range(1, 9)},
}


class Mortal(Kernel):
    """A kernel whose process ends at a size."""

    _last: int | None = None

    def forward(self, inputs: Any, *given: Any, **more: Any) -> Any:
        if inputs[0].shape[0] == self._last:
            raise KeyboardInterrupt
        return super().forward(inputs, *given, **more)


def tuned_for(
    seconds: float | None, store: Path | None = None, killed_at: int | None = None, **how: Any
) -> tuple[Any, Kernel, Any]:
    """(tuner, runner, configuration) after a tuning of SIZES, 16384 before 1, for so many seconds or to that size."""
    clock = quiet_clock(noise=0.02)
    runner, cfg, t = Mortal(clock, AS_ON_A_GPU), config(), tuner(clock, store)
    runner._last = killed_at
    with (
        pytest.raises(KeyboardInterrupt) if killed_at else contextlib.nullcontext(),
        t.autotune(True, budget_s=seconds, tuning_buckets=SIZES, round_up=True, crossover=False, **how),
    ):
        t.choose_one("op", [runner], cfg, inputs(16384))
    return t, runner, cfg


def measured(t: Any) -> set[int]:
    (book,) = t._known.books()
    return {record.bucket[0] for record in book.everything() if record.is_decided}


# --- what answers -----------------------------------------------------------------------------------------------
def test_the_winner_of_the_one_size_that_was_measured_serves_near_it_and_the_default_elsewhere() -> None:
    t, runner, cfg = tuned_for(None, killed_at=1)
    assert measured(t) == {16384}
    pick = t.bind("op", [runner], cfg)
    for n in (1, 16, 64, 1000, 4096, 8191):
        assert t.choose_one("op", [runner], cfg, inputs(n)) == pick(inputs(n)) == (runner, -1), n
        decision = t.decision("op", [runner], cfg, inputs(n))
        assert (decision.status, decision.bucket, decision.stands_in) == ("default", 16384, True)
        assert "16384" in decision.evidence.reason
        assert "did not finish" in decision.evidence.reason
        assert t.rank_tactics("op", [runner], cfg, inputs(n), k=3) == [-1]
    for n in (8192, 10_000, 16384):
        assert t.choose_one("op", [runner], cfg, inputs(n)) == pick(inputs(n)) == (runner, "large"), n
        decision = t.decision("op", [runner], cfg, inputs(n))
        assert (decision.status, decision.bucket, decision.stands_in) == ("measured", 16384, False)
    assert t.stats.cache_misses == 6


def test_explain_names_what_was_measured_and_why_it_does_not_answer() -> None:
    t, runner, cfg = tuned_for(None, killed_at=1)
    text = t.explain("op", [runner], cfg, inputs(16))
    assert "op at size 16: Mortal, tactic default (-1)  [default]" in text
    assert "measured so far: 16384, by a tuning that did not finish" in text
    assert "The nearest, 16384, has Mortal, tactic large" in text
    assert "At 16384:" in text
    assert "tuning again: it goes on where it stopped" in text
    assert "decided at bucket" not in text
    assert "decided at bucket 16384" in t.explain("op", [runner], cfg, inputs(9000))


def test_a_tuning_that_is_finished_later_answers_for_every_size(store: Path) -> None:
    tuned_for(None, store, killed_at=1)
    t, runner, cfg = tuned_for(None, store)
    assert measured(t) == set(SIZES)
    for n in (*SIZES, 3, 7, 100, 700, 5000):
        decision = t.decision("op", [runner], cfg, inputs(n))
        assert (decision.status, decision.stands_in) == ("measured", False)
        assert decision.bucket == min(size for size in SIZES if size >= n)
    fresh = tuner(quiet_clock(), store)
    assert fresh.choose_one("op", [runner], cfg, inputs(5000)) == (runner, "large"), "as the store has it"


def test_a_process_that_finds_an_unfinished_tuning_on_disk_serves_it_so(store: Path) -> None:
    _, runner, cfg = tuned_for(None, store, killed_at=1)
    serving = tuner(quiet_clock(), store)
    assert serving.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)
    assert serving.choose_one("op", [runner], cfg, inputs(16384)) == (runner, "large")
    (at,) = store.rglob("16384.json")
    (family,) = families(Store(store).entries())
    assert family.find((64,))[0].instead_of is not None, f"`moestro explain`, too, which knows no map: {at}"
    assert family.find((16384,))[0].tactic == "large"


def test_between_two_measured_sizes_with_the_same_winner_it_serves() -> None:
    t, runner, cfg = tuned_for(None, killed_at=256)  # after 16384, 1, 64, 4, 1024, 16
    assert measured(t) == {16384, 1, 64, 4, 1024, 16}
    found = {
        n: t.choose_one("op", [runner], cfg, inputs(n))[1] for n in (1, 3, 40, 65, 511, 512, 1500, 4096, 8000)
    }
    assert found == {
        **dict.fromkeys((1, 3, 40), "small"),
        **dict.fromkeys((65, 511), -1),  # between small and large, and less than half of 1024
        **dict.fromkeys((512, 1500, 4096, 8000), "large"),
    }


def test_beyond_an_unfinished_tuning_the_default_serves_with_one_warning(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64, 4096)), tuner(clock, store)
    known = record(64, 0, runner=static_key("op", [runner], cfg, inputs(1), {}).runners[0])
    t.choose_one("op", [runner], cfg, inputs(64))
    (book,) = t._known.books()
    book.add([known], next(iter(book.environments)))
    pick = t.bind("op", [runner], cfg)
    assert pick(inputs(64)) == (runner, 0)
    with pytest.warns(TuningWarning, match=r"size 3000 is beyond .* the default serves: .* measured is 64"):
        assert pick(inputs(3000)) == (runner, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(inputs(3500)) == t.choose_one("op", [runner], cfg, inputs(2500)) == (runner, -1)
    assert t.decision("op", [runner], cfg, inputs(3000)).status == "extrapolated"


def test_two_dynamic_sizes_are_answered_near_what_was_measured() -> None:
    specs = tuple(
        DynamicTensorSpec(0, dim, (16, 256), make_bucket_mapper((16, 256), round_up=True)) for dim in (0, 1)
    )
    rounds = roundings(TuningConfig(dynamic_tensor_specs=specs))
    known = {(256, 256): record(256, 0, bucket=(256, 256))}
    table = make_table(known, rounds)
    assert table is not None
    assert [table.find(at)[0].tactic for at in ((256, 256), (100, 17), (100, 16), (2, 2))] == [0, 0, -1, -1]
    finished = make_table({b: replace(r, tuned_for=(256, 256)) for b, r in known.items()}, rounds)
    assert finished is not None
    assert finished.find((2, 2))[0].tactic == 0


# --- the rule, against one that looks at every size -----------------------------------------------------------------
MAPS: dict[str, Any] = {
    "hybrid": map_to_hybrid_bucket_uncapped,
    "identity": lambda x: x,
    "list, down": make_bucket_mapper((8, 50, 300)),
    "list, up": make_bucket_mapper((8, 50, 300), round_up=True),
    "hundreds down": lambda x: max(1, x // 100 * 100),
    "a quarter": lambda x: max(1, x // 4),
}


def record(size: int, tactic: Any, finished: int = 0, runner: str = "a.Runner", bucket: Any = None) -> Record:
    return Record(
        bucket=bucket or (size,),
        runner=runner,
        tactic=tactic,
        status="measured",
        tuned_for=(finished,) if finished else (),
        created=1.0,
        evidence=Evidence(reason="decided"),
    )


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.integers(1, 700), st.sampled_from([-1, 0, 1]), min_size=1, max_size=6),
    st.sampled_from([0, 0, 1, 40, 333, 900]),
    st.sampled_from(sorted(MAPS)),
)
def test_a_size_is_answered_where_something_was_learned(
    known: dict[int, int], finished: int, name: str
) -> None:
    to_bucket = MAPS[name]
    rounds = roundings(config((1,), to_bucket))
    records = {(n,): record(n, tactic) for n, tactic in known.items()}
    whole = make_table({at: replace(r, tuned_for=(10_000,)) for at, r in records.items()}, rounds)
    if finished:
        records[(min(known),)] = replace(records[(min(known),)], tuned_for=(finished,))
    table = make_table(records, rounds, "the.Default")
    assert table is not None
    assert whole is not None
    points = sorted(known)
    scales = rounds[0].scales(points)
    for n in range(1, 1500):
        (at,) = whole.find((n,))[0].bucket
        place = to_bucket(n) if scales else n
        low, high = bisect_right(points, place) - 1, bisect_left(points, place)
        between = 0 <= low < high < len(points) and known[points[low]] == known[points[high]]
        near = to_bucket(n) == at or at / 2 <= place <= at
        found, _ = table.find((n,))
        assert found.bucket == (at,), n
        if near or between or place <= finished or finished >= points[-1]:
            assert (found.tactic, found.runner) == (known[at], "a.Runner"), n
        else:
            assert (found.tactic, found.runner, found.status) == (-1, "the.Default", "default"), n
            assert found.instead_of is not None
            assert found.instead_of.bucket == (at,)


# --- which tunings have finished --------------------------------------------------------------------------------
def book_of(*records: Record, why_not: Any = lambda key, record: None) -> DecisionsOfKey:
    clock = quiet_clock()
    key = static_key("op", [Kernel(clock, {-1: 1e-3})], config(), inputs(1), {})
    book = DecisionsOfKey(key, why_not=why_not)
    book.add([replace(r, runner=key.runners[0]) for r in records], "here")
    return book


def test_a_finished_tuning_stays_one_where_the_record_that_says_so_may_not_serve() -> None:
    book = book_of(
        record(1, 0), record(64, 1, 64), why_not=lambda key, r: "banned" if r.tactic == 1 else None
    )
    served = book.serving((), "here")
    assert set(served) == {(1,)}
    assert finished_for(served.values()) == (64,)


def test_a_bundles_finished_tuning_stays_one_where_a_bucket_was_decided_here() -> None:
    book = book_of(record(1, 0), record(64, 1, 64))
    assert finished_for(book.serving((), "here").values()) == (64,)
    book.cover("here", record(64, 1, 64))
    (here, *_) = [r for r in book.everything() if r.bucket == (64,)]
    book.add([replace(here, tactic=2, tuned_for=(), created=9.0)], "here")
    assert finished_for(book.serving((), "here").values()) == (64,)
    assert book.serving((), "here")[(64,)].tactic == 2


def test_what_another_runner_list_has_finished_is_finished_where_its_last_winner_is_not_ours() -> None:
    clock = quiet_clock()
    a, b = Kernel(clock, {-1: 1e-3}, name="a"), Kernel(clock, {-1: 1e-3}, name="b")
    both, ours = (static_key("op", runners, config(), inputs(1), {}) for runners in ([a, b], [a]))
    book = DecisionsOfKey(ours)
    of_a, of_b = both.runners
    book.relate_records(both, [record(1, 0, runner=of_a), record(64, 0, 64, runner=of_b)], "here", "a store")
    served = book.serving((), "here")
    assert set(served) == {(1,)}
    assert finished_for(served.values()) == (64,)


def test_losing_a_file_does_not_make_a_tuning_an_unfinished_one(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((1, 16, 256)), tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(256))
    for lost in ("256.json", "16.json"):
        next(store.rglob(lost)).unlink()
        assert tuner(clock, store).choose_one("op", [runner], cfg, inputs(200)) == (runner, 0), lost


# --- the budget ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", [0.2, 0.4])
def test_ahead_of_calls_no_bucket_takes_the_budget_from_the_others(seconds: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t, runner, cfg = tuned_for(seconds, ahead=True)
    assert list(dict.fromkeys(size for size, _ in runner._runs)) == list(SIZES), "the shortest first"
    (book,) = t._known.books()
    whole = {record.bucket[0] for record in book.everything() if record.complete}
    assert whole >= set(SIZES[:6])
    best = {n: min(AS_ON_A_GPU, key=lambda tactic, n=n: AS_ON_A_GPU[tactic](n)) for n in SIZES}
    for n in SIZES[:7]:
        assert t.choose_one("op", [runner], cfg, inputs(n))[1] == best[n], n
    assert sum(record.evidence.seconds for record in book.everything()) <= 1.1 * seconds


def test_ahead_of_calls_every_bucket_has_something_where_all_take_as_long() -> None:
    def decided(ahead: bool) -> set[int]:
        clock = quiet_clock(noise=0.05)
        kernel = Kernel(clock, {-1: 1e-3, **{k: 1e-3 * (0.97 + 0.005 * k) for k in range(6)}})
        t = tuner(clock)
        with t.autotune(True, budget_s=1.0, ahead=ahead, tuning_buckets=SIZES, round_up=True):
            t.choose_one("op", [kernel], config(), inputs(16384))
        return measured(t)

    assert decided(ahead=True) == set(SIZES)
    assert decided(ahead=False) != set(SIZES)


def test_a_call_that_waits_has_its_own_size_measured_first_and_whole() -> None:
    t, runner, cfg = tuned_for(0.2)
    (first, *_) = runner._runs
    assert first[0] == 16384
    (book,) = t._known.books()
    assert {r.bucket[0]: r.evidence.seconds for r in book.everything()}[16384] > 0.15
    assert t.choose_one("op", [runner], cfg, inputs(16384)) == (runner, "large")


def test_ahead_what_was_cut_short_is_finished_with_what_is_left() -> None:
    t, _, _ = tuned_for(1.0, ahead=True)
    (book,) = t._known.books()
    assert {record.bucket[0] for record in book.everything() if record.complete} == set(SIZES)

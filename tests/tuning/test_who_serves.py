"""Whose decision serves: by runner, by policy, by hand; and what is kept of calls that decide nothing."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import Fake, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning import DynamicTensorSpec, MeasurementPolicy, TunableRunner, TuningConfig
from moestro.tuning.lookup.known import EMPTY_KEPT
from moestro.tuning.spec.tactic_list import TacticList

TIMES = {-1: 1e-3, 0: 5e-4, 1: 4e-4}
CFG = config((64,))


class A(Kernel):
    pass


class B(Kernel):
    pass


def test_a_decision_is_found_in_any_order_and_length_also_from_disk(store: Path) -> None:
    clock = quiet_clock()
    a, b, t = A(clock, {-1: 1e-3, 0: 9e-4}), B(clock, {-1: 1e-3, 1: 2e-4}), tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [a, b], CFG, inputs(64))
    for known in (t, tuner(clock, store)):
        assert known.choose_one("op", [b, a], CFG, inputs(64)) == (b, 1)
        assert known.choose_one("op", [b], CFG, inputs(64)) == (b, 1)
        assert known.choose_one("op", [a], CFG, inputs(64)) == (a, -1)
        assert known.choose_one("op", [b, a], CFG, inputs(64, width=32)) == (b, -1), "another question"


def test_another_list_is_measured_by_itself_and_its_own_decision_counts_more() -> None:
    clock = quiet_clock()
    a, b, t = A(clock, {-1: 1e-3, 0: 3e-4}), B(clock, {-1: 1e-3, 1: 2e-4}), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [b], CFG, inputs(64))
        assert t.choose_one("op", [a, b], CFG, inputs(64)) == (b, 1)
    assert a._runs, "the longer list was raced"


def test_two_runners_of_one_identity_in_a_list_are_two_candidates() -> None:
    clock = quiet_clock()
    slow, fast, t = Kernel(clock, {-1: 1e-3, 0: 9e-4}), Kernel(clock, {-1: 1e-3, 0: 2e-4}), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [slow, fast], CFG, inputs(64)) == (fast, 0)
    assert t.choose_one("op", [slow, fast], CFG, inputs(64)) == (fast, 0)


def test_another_policy_measures_again_and_both_keep_their_decisions() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, {-1: 1e-3, 0: 9.5e-4}), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], CFG, inputs(64))[1] == 0
    runs = len(runner._runs)
    with t.autotune(True, policy=MeasurementPolicy(min_gain=0.5, max_seconds=None)):
        assert t.choose_one("op", [runner], CFG, inputs(64))[1] == -1
    assert len(runner._runs) > runs
    assert t.choose_one("op", [runner], CFG, inputs(64))[1] == 0, "outside, the tuner's own policy decides"


def test_what_only_another_policy_has_measured_serves_rather_than_nothing() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock)
    with t.autotune(True, policy=MeasurementPolicy(min_gain=0.1, max_seconds=None)):
        t.choose_one("op", [runner], CFG, inputs(64))
    assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, 1)


def test_an_operations_wish_for_a_cold_or_warm_cache_is_part_of_the_policy() -> None:
    clock, t = quiet_clock(), tuner(quiet_clock())
    runner = Kernel(clock, TIMES)
    seen = []
    t._timer = None
    t._timer_for = lambda device, policy, graph: (
        seen.append(policy.cold_cache) or type("T", (), {"name": "t"})()
    )  # type: ignore[method-assign,assignment,func-returns-value]
    for given in (None, False, True):
        t.decision("op", [runner], config((64,), use_cold_l2_cache=given), inputs(64))
    assert [*dict.fromkeys(seen)] == [True, False]


# --- by hand -----------------------------------------------------------------------------------------
def lists(tmp_path: Path, **content: Any) -> list[Path]:
    path = tmp_path / "tactics.json"
    path.write_text(json.dumps(content))
    return [path]


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        ({"ban": {"op::Kernel": [1]}}, 0),
        ({"ban": {"o*::*": [0, 1]}}, -1),
        ({"ban": {"op::Kernel": ["*"]}}, -1),
        ({"ban": {"other::Kernel": [1]}}, 1),
        ({"allow": {"op::Kernel": [0]}}, 0),
        ({"invalid_tactics": {"op::Kernel": [1]}}, 0),
    ],
)
def test_a_list_by_hand_keeps_tactics_out_of_tuning_and_of_serving(
    store: Path, tmp_path: Path, content: Any, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = quiet_clock()
    runner = Kernel(clock, TIMES)
    free = tuner(clock, store)
    with free.autotune(True):
        assert free.choose_one("op", [runner], CFG, inputs(64))[1] == 1
    monkeypatch.setenv("MOESTRO_TACTICS", str(lists(tmp_path, **content)[0]))
    bound = tuner(clock, store)
    assert bound.choose_one("op", [runner], CFG, inputs(64))[1] in {chosen, -1}
    again = tuner(clock)
    with again.autotune(True):
        assert again.choose_one("op", [runner], CFG, inputs(64))[1] == chosen


@pytest.mark.parametrize("content", [{"ban": {"op": [1]}}, {"ban": {"op::K": 1}}, {"ban": 3}])
def test_a_list_that_is_none_is_an_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(TuningError, match="not a list of tactics"):
        TacticList(lists(tmp_path, **content))


def test_lists_stand_for_tuples_and_dictionaries_for_themselves(tmp_path: Path) -> None:
    rules = TacticList(lists(tmp_path, ban={"op::K": [[128, [1, 2]], {"a": 1}]}))
    assert rules.reason("op", "K", [128, [1, 2]]) is not None
    assert rules.reason("op", "K", {"dict": [["a", 1]]}) is not None
    assert rules.reason("op", "K", {"dict": [["a", 2]]}) is None
    assert rules.reason("op", "K", -1) is None


# --- growth ------------------------------------------------------------------------------------------
def test_a_keyword_with_another_value_in_every_call_leaves_nothing_without_bound() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], CFG, inputs(64))

    def call(first: int, last: int) -> None:
        for i in range(first, last):
            t.choose_one("op", [runner], CFG, inputs(60), step=i)

    call(0, 2 * EMPTY_KEPT)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call(2 * EMPTY_KEPT, 6 * EMPTY_KEPT)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 3 << 19, "1.5 MiB, however many values there are"
    assert len(t._known.books()) <= 2 * EMPTY_KEPT
    assert t.choose_one("op", [runner], CFG, inputs(60)) == (runner, 1), "what was decided is kept"


def fresh(clock: Any) -> tuple[Any, TuningConfig]:
    """A class, a runner and a configuration with functions, all made anew."""

    class Fresh(TunableRunner):
        def __init__(self) -> None:
            self.tile, self._clock = (128, 64), clock

        def get_valid_tactics(self, inputs: Any, profile: Any) -> Any:
            return [0]

        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> None:
            self._clock.advance(1e-3 if tactic == -1 else 2e-4)

    return Fresh(), TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec(0, 0, (64,), lambda n: 64),))


def test_runners_classes_and_configurations_made_anew_share_one_site_and_leave_nothing() -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True):
        runner, cfg = fresh(clock)
        t.choose_one("op", [runner], cfg, inputs(64))
    for _ in range(20):
        runner, cfg = fresh(clock)
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    del runner, cfg
    gc.collect()
    sites = {id(site) for site in t._sites.known.values()}
    assert len(sites) <= 1
    assert len(t._sites._by_signature) == 2, "inside autotune(True) and outside"


def test_a_runner_whose_attribute_differs_is_another_runner_though_made_alike() -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [Kernel(clock, TIMES, tile=(1, 2))], CFG, inputs(64))
    for tile, expected in (((1, 2), 1), ((1, 3), -1), ((1, 2), 1)):
        runner = Kernel(clock, TIMES, tile=tile)
        assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, expected)


def test_handles_of_runners_are_not_kept_alive() -> None:
    import weakref

    class Handle:
        pass

    clock, handle = quiet_clock(), Handle()
    t, watch = tuner(clock), weakref.ref(handle)
    with pytest.warns(UserWarning, match="handle"):
        t.choose_one("op", [B(clock, TIMES, handle=handle)], CFG, inputs(64))
    del handle
    gc.collect()
    assert watch() is None


# --- odd inputs --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "float4_e2m1fn_x2",
        "float8_e8m0fnu",
        "float8_e5m2",
        "uint16",
        "uint64",
        "bool",
        "complex64",
        "int8",
        "bfloat16",
    ],
)
def test_dynamic_inputs_of_odd_dtypes_are_made(name: str) -> None:
    from moestro.tuning.spec.inputs import synthesise

    dtype = getattr(torch, name)
    given = (
        torch.arange(64 * 4 * dtype.itemsize, dtype=torch.int64).to(torch.uint8).reshape(64, -1).view(dtype)
    )
    cfg = config((32,))
    profile = cfg.profile([tuple(given.shape)], (32,))
    (made,) = synthesise(cfg, profile, [given], None, 0)
    assert (made.dtype, made.shape) == (dtype, (32, 4))


def test_several_sizes_find_their_point_without_searching_all_of_them_again() -> None:
    clock = quiet_clock()
    cfg = TuningConfig(
        dynamic_tensor_specs=(
            DynamicTensorSpec(0, 0, (1, 8), lambda n: n),
            DynamicTensorSpec(0, 1, (4, 64), lambda n: n),
        )
    )
    runner, t = Kernel(clock, TIMES), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, [Fake((8, 64))])
    found = {
        (n, m): t.decision("op", [runner], cfg, [Fake((n, m))]).bucket for n in (1, 3, 8) for m in (4, 60)
    }  # type: ignore[union-attr]
    assert found == {
        (1, 4): (1, 4),
        (1, 60): (1, 64),
        (3, 4): (1, 4),
        (3, 60): (1, 64),
        (8, 4): (8, 4),
        (8, 60): (8, 64),
    }

"""autotune contexts: nesting, inheritance, threads, tasks, forks, options."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

import moestro.tuning.tuner as tuner_module
from moestro.errors import TuningError
from moestro.tuning import AutoTuner, MeasurementPolicy, autotune

TIMES = {-1: 1e-3, 0: 5e-4}


def test_explicit_buckets_are_what_is_measured() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config(), tuner(clock)
    with t.autotune(True, tuning_buckets=(600, 100, 300, 100)):
        t.choose_one("op", [runner], cfg, inputs(200))
    assert runner.sizes == {100, 300, 600}


@pytest.mark.parametrize(("round_up", "bucket"), [(True, 300), (False, 100), (None, 100)])
def test_rounding_chooses_the_direction_among_explicit_buckets(round_up: bool | None, bucket: int) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config(), tuner(clock)
    with t.autotune(True, tuning_buckets=(100, 300, 600), round_up=round_up):
        t.choose_one("op", [runner], cfg, inputs(200))
        decision = t.decision("op", [runner], cfg, inputs(200))
    assert decision is not None
    assert decision.bucket == bucket


def test_contexts_inherit_what_they_do_not_set_and_restore_on_exit() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config(), tuner(clock)

    def tuned(op: str) -> set[int]:
        runner._runs.clear()
        t.choose_one(op, [runner], cfg, inputs(50))
        return runner.sizes

    with t.autotune(True, tuning_buckets=(10, 20)):
        assert tuned("a") == {10, 20}
        with t.autotune(tuning_buckets=(30,)):
            assert tuned("b") == {30}
            with t.autotune(True, round_up=True):
                assert tuned("c") == {30}
            with t.autotune(False):
                assert tuned("d") == set()
        assert tuned("e") == {10, 20}
    assert tuned("f") == set()


def test_an_error_inside_leaves_the_context_behind() -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock)
    with pytest.raises(ZeroDivisionError), t.autotune(True):
        raise ZeroDivisionError
    t.choose_one("op", [runner], config(), inputs(50))
    assert runner._runs == []


def test_skipped_ops_add_up_and_get_their_default() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64,)), tuner(clock)
    with t.autotune(True):
        t.choose_one("a", [runner], cfg, inputs(64))
    with t.autotune(True, skip_ops={"a"}):
        assert t.choose_one("a", [runner], cfg, inputs(64)) == (runner, -1)
        with t.autotune(True, skip_ops=["b"]):
            for op in "ab":
                assert t.choose_one(op, [runner], cfg, inputs(64)) == (runner, -1)
            assert t.choose_one("c", [runner], cfg, inputs(64)) == (runner, 0)
        assert t.choose_one("b", [runner], cfg, inputs(64)) == (runner, 0)
    assert t.choose_one("a", [runner], cfg, inputs(64)) == (runner, 0)


def test_another_threads_plain_call_never_tunes() -> None:
    clock = quiet_clock()
    mine, theirs = Kernel(clock, TIMES), Kernel(clock, TIMES)
    cfg, t = config((64,)), tuner(clock)
    found: list[Any] = []
    with t.autotune(True):
        pick = t.bind("theirs", [theirs], cfg)
        thread = threading.Thread(
            target=lambda: found.extend(
                [t.choose_one("theirs", [theirs], cfg, inputs(64)), pick(inputs(64)), pick(inputs(64))]
            )
        )
        thread.start()
        thread.join()
        t.choose_one("mine", [mine], cfg, inputs(64))
    assert found == [(theirs, -1)] * 3
    assert theirs._runs == []
    assert mine._runs


def test_an_inner_cache_adds_to_the_outer_one(tmp_path: Path) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64,)), tuner(clock)
    with t.autotune(True, cache=tmp_path / "a"):
        t.choose_one("a", [runner], cfg, inputs(64))
        with t.autotune(True, cache=tmp_path / "b"):
            assert t.choose_one("a", [runner], cfg, inputs(64)) == (runner, 0)
            t.choose_one("b", [runner], cfg, inputs(64))
        assert t.choose_one("a", [runner], cfg, inputs(64)) == (runner, 0)
    assert t.choose_one("b", [runner], cfg, inputs(64)) == (runner, 0)


def test_a_cache_holds_what_its_context_served_also_if_it_was_known_before(tmp_path: Path) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64,)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    runs = len(runner._runs)
    with t.autotune(True, cache=tmp_path / "later"):
        t.choose_one("op", [runner], cfg, inputs(64))
    assert len(runner._runs) == runs
    fresh = tuner(clock, tmp_path / "later")
    assert fresh.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)


def test_a_context_serves_from_its_cache_without_tuning(tmp_path: Path) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, TIMES), config((64,))
    with tuner(clock).autotune(True, cache=tmp_path) as t:
        t.choose_one("op", [runner], cfg, inputs(64))
    fresh = tuner(clock)
    assert fresh.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)
    with fresh.autotune(False, cache=tmp_path):
        assert fresh.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    assert fresh.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0), "and it stays known"


def test_a_contexts_policy_measures() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 7e-4}), config((64,)), tuner(clock)
    with t.autotune(True, policy=MeasurementPolicy(min_gain=0.7)):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)


def test_the_module_function_drives_the_process_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, TIMES), config((64,))
    monkeypatch.setenv("MOESTRO_STORE", str(tmp_path / "user"))
    monkeypatch.setattr(tuner_module.AutoTuner, "_default", None)
    assert AutoTuner.get() is AutoTuner.get()
    assert AutoTuner.get().store is not None
    assert AutoTuner.get().store.root == tmp_path / "user"
    monkeypatch.setattr(tuner_module.AutoTuner, "_default", tuner(clock))
    with autotune(True, cache=tmp_path / "c") as driven:
        assert driven is AutoTuner.get()
        AutoTuner.get().choose_one("op", [runner], cfg, inputs(64))
    assert AutoTuner.get().choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"tuning_buckets": ()},
        {"tuning_buckets": (0, 4)},
        {"tuning_buckets": (1.5,)},
        {"budget_s": -1},
        {"budget_s": True},
    ],
)
def test_settings_that_make_no_sense_are_errors(options: Any) -> None:
    t = AutoTuner()
    with pytest.raises(TuningError), t.autotune(True, **options):
        pass
    assert t._contexts.current is None
    assert t._contexts.active == 0


def test_an_asyncio_task_has_a_context_of_its_own() -> None:
    clock = quiet_clock()
    t, runner, cfg = tuner(clock), Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64,))

    async def tuning(entered: asyncio.Event, served: asyncio.Event) -> None:
        with t.autotune(True):
            entered.set()
            await served.wait()

    async def serving(entered: asyncio.Event, served: asyncio.Event) -> None:
        await entered.wait()
        t.choose_one("op", [runner], cfg, inputs(4))
        served.set()

    async def main() -> None:
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(tuning(*events), serving(*events))

    asyncio.run(main())
    assert runner._runs == []
    assert t._contexts.active == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_was_forked_inside_a_context_looks_up_until_it_enters_one() -> None:
    clock = quiet_clock()
    t, runner, cfg = tuner(clock), Kernel(clock, {-1: 1e-3, 0: 5e-4}), config((64,))
    with t.autotune(True), t._measuring:
        child = os.fork()
        if child == 0:
            before = t.choose_one("op", [runner], cfg, inputs(64))[1], len(runner._runs)
            with t.autotune(True):
                after = t.choose_one("op", [runner], cfg, inputs(64))[1]
            os._exit(0 if (before, after) == ((-1, 0), 0) else 1)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
    assert done
    assert os.waitstatus_to_exitcode(status) == 0

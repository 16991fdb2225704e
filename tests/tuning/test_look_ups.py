"""Look-ups: they wait for no measurement, grow no table, and see a runner that has changed or gone."""

from __future__ import annotations

import gc
import threading
from typing import Any

from tuning_fakes import FAST_LATER, Kernel, config, inputs, quiet_clock, tuner


def test_no_lock_is_held_for_look_ups_while_another_thread_measures() -> None:
    clock = quiet_clock()
    measuring, looked_up = threading.Event(), threading.Event()

    class Slow(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            measuring.set()
            assert looked_up.wait(200)
            clock.advance(1e-3)

    t, cfg = tuner(clock), config((64,))
    slow, other = Slow(clock, {-1: 0, 0: 0}), Kernel(clock, {-1: 1e-3, 0: 5e-4})

    def tune() -> None:
        with t.autotune(True):
            t.choose_one("slow", [slow], cfg, inputs(64))

    thread = threading.Thread(target=tune)
    thread.start()
    assert measuring.wait(200)
    pick = t.bind("other", [other], cfg)
    for _ in range(3):
        assert t.choose_one("other", [other], cfg, inputs(64)) == pick(inputs(64)) == (other, -1)
        assert t.choose_one("slow", [slow], cfg, inputs(64)) == (slow, -1), "a plain call never tunes"
        assert t.decision("slow", [slow], cfg, inputs(64)) is None
    looked_up.set()
    thread.join(200)
    assert not thread.is_alive()


def test_look_ups_of_many_sizes_grow_no_table() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, FAST_LATER), config(), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(20_000))
    pick = t.bind("op", [runner], cfg)
    for n in (1, 20_000):
        t.choose_one("op", [runner], cfg, inputs(n))
        pick(inputs(n))
    gc.collect()
    before = len(gc.get_objects())
    for n in range(1, 20_001, 3):
        pick(inputs(n))
        t.choose_one("op", [runner], cfg, inputs(n))
    gc.collect()
    assert len(gc.get_objects()) - before < 20


def test_a_dead_runner_is_forgotten() -> None:
    clock = quiet_clock()
    cfg, t = config((64,)), tuner(clock)
    for _ in range(20):
        runner = Kernel(clock, {-1: 1e-3})
        t.choose_one("op", [runner], cfg, inputs(64))
    del runner
    gc.collect()
    assert t._sites.known == {}


def test_a_changed_public_attribute_is_another_key() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 5e-4}, stages=3, tiles=[1, 2]), config((64,)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    for _ in range(2):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    runner.stages = 4  # type: ignore[attr-defined]
    for _ in range(2):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)
    runner.stages = 3  # type: ignore[attr-defined]
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    runner.tiles.append(3)  # type: ignore[attr-defined]
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)

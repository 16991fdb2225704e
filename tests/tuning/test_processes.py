"""Stores shared by processes, processes that are killed, candidates that kill or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TIMES, Crashing
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro import machine
from moestro.tuning import get_hybrid_num_tokens_buckets

SCRIPT = Path(__file__).with_name("processes.py")


def start(store: Path, op: str, size: int, pause: float = 0.0) -> subprocess.Popen[bytes]:
    # an environment has the number of threads: the child's is ours, whatever a test before this one has set
    env = {**os.environ, "OMP_NUM_THREADS": str(machine.threads())}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(store), op, str(size), str(pause)], env=env)


def decided(store: Path) -> set[int]:
    return {int(p.stem) for p in store.rglob("*.json") if p.stem.isdigit()}


def test_a_killed_run_loses_no_finished_bucket_and_is_continued(store: Path) -> None:
    child = start(store, "op", 4096, pause=0.05)
    deadline = time.monotonic() + 200
    while len(decided(store)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = decided(store)
    assert 4 <= len(finished) < len(get_hybrid_num_tokens_buckets(4096))
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, store)
    with t.autotune(True, crossover=False):
        t.choose_one("op", [runner], config(), inputs(4096))
    assert runner.sizes.isdisjoint(finished)
    assert runner.sizes | finished == set(get_hybrid_num_tokens_buckets(4096))


def test_two_processes_tuning_into_one_store_lose_nothing(store: Path) -> None:
    children = [start(store, "op", 4096), start(store, "op", 3000), start(store, "other", 3000)]
    assert [child.wait(200) for child in children] == [0, 0, 0]
    expected = set(get_hybrid_num_tokens_buckets(4096)) | {3000}
    assert decided(store) == expected
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, store)
    with t.autotune(True, crossover=False):
        for op, size in (("op", 4096), ("op", 3000), ("other", 3000)):
            t.choose_one(op, [runner], config(), inputs(size))
    assert runner._runs == []


def test_isolated_candidates_may_crash_or_hang(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg = Crashing(clock, {}), config((64,))
    t = tuner(clock, store, isolate=True, time_limit=4.0)
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    decision = t.decision("op", [runner], cfg, inputs(64))
    assert decision is not None
    reasons = {c.tactic: c.reason for c in decision.evidence.candidates if c.fate == "quarantined"}
    assert set(reasons) == {1, 2}
    assert "SIGKILL" in reasons[1]
    assert "hangs" in reasons[2]
    assert len(list(store.rglob("quarantine-*.json"))) == 2


@pytest.mark.parametrize("bound", [False, True])
def test_capturing_a_graph_looks_up_and_never_tunes(monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    from moestro.errors import TuningError

    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64,)), tuner(clock)
    pick = t.bind("op", [runner], cfg) if bound else lambda ins: t.choose_one("op", [runner], cfg, ins)
    with t.autotune(True):
        pick(inputs(64))
        runs = len(runner._runs)
        monkeypatch.setattr("moestro.tuning.tuner.capturing", lambda: True)
        assert pick(inputs(64)) == (runner, 1)
        with pytest.raises(TuningError, match="capture"):
            pick(inputs(64, width=32))
    assert pick(inputs(64)) == (runner, 1)
    assert t.choose_one("op", [runner], cfg, inputs(64, width=32)) == (runner, -1)
    assert len(runner._runs) == runs

"""Ranks as real processes that are slow, die, are killed, start cold or disagree: every run ends, and says why.

A few runs of benchmarks/group_failures.py, whose 200 are in benchmarks/results/group_failures.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import parallel_cases as cases
from gloo_ranks import TIMEOUT_S, Ranks

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "group_failures.json"


def test_a_few_runs_with_failures_end_as_they_must() -> None:
    script = ROOT / "benchmarks" / "group_failures.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(script), "--runs", "5", "--first", "3"],
        env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "5 runs, 0 not good" in done.stdout


def test_a_rank_that_raises_is_named_to_those_that_wait_for_it_long_before_their_time_out() -> None:
    ranks = Ranks(2)  # its own: a collective is left behind
    try:
        started = time.monotonic()
        waiting, raising = ranks.run(cases.message, "compute", size=2)
    finally:
        ranks.close()
    assert "ZeroDivisionError" in raising
    assert "GroupError" in waiting
    assert "rank 1 left: ZeroDivisionError" in waiting
    assert time.monotonic() - started < TIMEOUT_S / 3


def test_of_the_recorded_runs_all_were_good_and_every_trouble_was_among_them() -> None:
    data = json.loads(RESULT.read_text())
    assert len(data["runs"]) >= 200
    assert [run["seed"] for run in data["runs"] if not run["good"]] == []
    troubles = {run["trouble"] for run in data["runs"]}
    assert troubles == {"none", "slow", "dead", "killed", "cold", "differs", "raises", "budget"}

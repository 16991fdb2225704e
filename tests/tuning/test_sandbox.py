"""Candidates that exit, crash, hang or raise do so in a child process; the next one is tried as before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import sandbox_fakes as fakes

from moestro.errors import TuningError
from moestro.tuning.measure.sandbox import Sandbox


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(time_limit=60.0) as box:
        box.load(fakes.Vandal(), [(2880, 7)], {"parent": os.getpid()})
        yield box


@pytest.mark.parametrize("tactic", [-1, "parent", "scope", "pool", (64, "x")])
def test_a_sound_tactic_runs_in_another_process_inside_the_measurement_scope(
    box: Sandbox, tactic: object
) -> None:
    assert box.check(tactic) is None


@pytest.mark.parametrize(
    ("tactic", "why"),
    [
        ("exit", "crashed: its process exited with status 3"),
        ("segfault", "crashed: its process was killed by SIGSEGV"),
        ("raise", "ValueError: tile does not fit (2880, 7)"),
    ],
)
def test_a_bad_tactic_gives_its_reason_and_the_next_one_runs(box: Sandbox, tactic: str, why: str) -> None:
    assert box.check(tactic) == why
    assert box.check("parent") is None


def test_a_hang_is_killed_at_the_time_limit_and_the_next_one_runs() -> None:
    with Sandbox(time_limit=2.0) as box:
        box.load(fakes.Vandal(), [])
        assert box.check("hang") == "hangs: no answer in 2 s"
        assert box.check(-1) is None


def test_an_exception_keeps_the_child_a_crash_replaces_it(box: Sandbox) -> None:
    assert box.check(-1) is None
    first = box._child
    box.check("raise")
    assert box._child is first
    box.check("exit")
    assert box.check(-1) is None
    assert box._child is not first


def test_close_ends_the_child() -> None:
    with Sandbox() as box:
        box.load(fakes.Vandal(), [])
        box.check(-1)
        child = box._child
        assert child is not None
        assert child.is_alive()
    assert not child.is_alive()


def test_a_runner_that_cannot_be_pickled_is_an_error_that_names_it() -> None:
    with Sandbox() as box, pytest.raises(TuningError, match=r"runner Unpicklable.*cannot be sent"):
        box.load(fakes.Unpicklable(), [])


def test_a_runner_that_the_child_cannot_load_is_an_error_that_says_why() -> None:
    with Sandbox() as box:
        box.load(fakes.OnlyHere(), [])
        with pytest.raises(TuningError, match="could not load the runner: RuntimeError: no such device here"):
            box.check(-1)


def test_check_before_load_is_an_error() -> None:
    with Sandbox() as box, pytest.raises(TuningError, match="nothing is loaded"):
        box.check(-1)

"""Kernels compiled in other processes: real ones in a program of its own, and what happens where they are of no use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from moestro.errors import BackendError
from moestro.kernels.triton import elsewhere

PROGRAM = Path(__file__).with_name("compile_elsewhere.py")


def test_what_other_processes_compile_is_found_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["-1", "two", "1.5"])
def test_a_bad_number_of_processes_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(elsewhere.VARIABLE, text)
    with pytest.raises(BackendError, match=elsewhere.VARIABLE):
        elsewhere.processes()


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Launch:
    """Takes so many seconds to compile here."""

    kernel = SimpleNamespace(__name__="gemm")

    def __init__(self, key: str, seconds: float, clock: Clock) -> None:
        self.key, self.seconds, self.compiled, self.clock = key, seconds, 0, clock

    def compile(self) -> str:
        self.clock.now += self.seconds
        self.compiled += 1
        return "kernel"


class Elsewhere(elsewhere.Farm):
    """Processes that answer in 4 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(2, None)  # type: ignore[arg-type]
        self.sent, self.clock = 0, clock

    def compile(self, launch: Any) -> bool:
        self.clock.now += 4
        self.sent += 1
        return True


def farm(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere(Clock())
    monkeypatch.setattr(elsewhere, "time", made.clock)
    monkeypatch.setattr(elsewhere, "processes", lambda: 2)
    monkeypatch.setattr(elsewhere, "_farm_of", lambda number, target: made)
    monkeypatch.setattr(elsewhere.triton.runtime.driver, "_active", elsewhere._Absent(None))  # type: ignore[arg-type]
    return made


def test_a_cache_that_gives_nothing_back_is_said_once_and_nothing_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = farm(monkeypatch)
    launches = [Launch(key, 3.0, made.clock) for key in "abc"]
    with caplog.at_level(logging.WARNING, "moestro"):
        assert [elsewhere.compiled(launch) for launch in launches] == ["kernel"] * 3
    assert (made.sent, [launch.compiled for launch in launches]) == (1, [1, 1, 1])
    assert [elsewhere.VARIABLE in record.message for record in caplog.records] == [True]


def test_a_cache_that_gives_back_what_was_put_there_goes_on_being_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = farm(monkeypatch)
    assert [elsewhere.compiled(Launch(key, 0.2, made.clock)) for key in "abc"] == ["kernel"] * 3
    assert made.sent == 3
    assert not caplog.records


def test_a_kernel_that_this_process_has_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = farm(monkeypatch)
    launch = Launch("a", 0.2, made.clock)
    assert [elsewhere.compiled(launch) for _ in range(3)] == ["kernel"] * 3
    assert (made.sent, launch.compiled) == (1, 3)


def test_where_no_process_can_be_started_kernels_are_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(target: Any) -> None:
        raise OSError("no processes left")

    made = elsewhere.Farm(2, None)  # type: ignore[arg-type]
    launch = Launch("a", 0.0, Clock())
    monkeypatch.setattr(elsewhere, "_Process", fails)
    monkeypatch.setattr(elsewhere, "dumps", lambda launch: b"")
    assert made.compile(launch) is False  # type: ignore[arg-type]


def test_threads_share_the_processes_and_a_forked_child_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_farms", {})
    one, again = (elsewhere._farm_of(2, None) for _ in range(2))  # type: ignore[arg-type]
    assert one is again
    monkeypatch.setattr(elsewhere.os, "getpid", lambda: -1)
    assert elsewhere._farm_of(2, None) is not one  # type: ignore[arg-type]


def test_without_processes_kernels_are_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(elsewhere.VARIABLE, raising=False)
    launch = Launch("a", 0.0, Clock())
    assert elsewhere.compiled(launch) == "kernel"
    assert launch.compiled == 1

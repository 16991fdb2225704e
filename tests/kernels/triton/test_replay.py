"""Replayed launches equal ordinary ones, argument by argument, and whatever cannot be replayed is launched as ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

from moestro.errors import BackendError
from moestro.kernels.triton import replay


def test_every_path_is_replayed_argument_by_argument() -> None:
    """Paths, formats, sizes, streams, addresses at random; hooks, devices, moved weights, threads: see the program."""
    path = Path(__file__).with_name("replay_all.py")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", replay.VARIABLE)}
    done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(replay, "INTERPRETED", False)
    monkeypatch.delenv(replay.VARIABLE, raising=False)
    replay.why_plain.cache_clear()
    yield monkeypatch
    replay.why_plain.cache_clear()


def test_an_unknown_triton_launches_as_ever_and_says_so_once(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(replay.triton, "__version__", "4.2.0")
    reasons = {replay.why_plain() for _ in range(3)}
    assert reasons == {"Triton 4.2.0 is not known"}
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    for version in ("3.6.0", "3.7.1"):
        replay.why_plain.cache_clear()
        fresh.setattr(replay.triton, "__version__", version)
        assert replay.why_plain() is None


def test_the_switch_turns_it_off_and_takes_two_words(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(replay.triton, "__version__", "3.6.0")
    fresh.setenv(replay.VARIABLE, "plain")
    assert replay.why_plain() == f"{replay.VARIABLE}=plain"
    replay.why_plain.cache_clear()
    fresh.setenv(replay.VARIABLE, "fast")
    with pytest.raises(BackendError, match="must be graphs or replay or plain, got 'fast'"):
        replay.why_plain()

"""The hook that compiles a tactic's kernels ahead of its first run."""

from __future__ import annotations

import threading

import pytest
from offline import inputs_of, runner_of

from moestro.kernels.triton.plan import Launch


def test_a_tactics_kernels_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    inputs = inputs_of(runner, 40)
    count = len(runner.plan(inputs, -1))
    together = threading.Barrier(count, timeout=20)
    compiled = []

    def compile(launch: Launch) -> None:
        together.wait()
        compiled.append(launch.kernel)

    monkeypatch.setattr(Launch, "compile", compile)
    runner.compile(inputs, -1)
    assert count > 1
    assert len(compiled) == count


def test_a_kernel_that_does_not_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(launch: Launch) -> None:
        raise RuntimeError("no such tile")

    monkeypatch.setattr(Launch, "compile", compile)
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    with pytest.raises(RuntimeError, match="no such tile"):
        runner.compile(inputs_of(runner, 3), -1)

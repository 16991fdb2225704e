"""The hook that compiles a tactic's kernels ahead of its first run."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from offline import inputs_of, runner_of

from moestro.kernels.triton import choose
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.device import sort
from moestro.kernels.triton.device.arguments import Rows


def test_a_tactics_kernels_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    inputs = inputs_of(runner, 40)
    count = len(runner.plan(inputs, -1))
    together = threading.Barrier(count, timeout=200)
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


def test_sizes_and_tactics_share_their_kernels() -> None:
    """Tuning compiles each kernel once: all sorting is one kernel for each number of threads, whatever the widths."""
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    keys = [
        launch.key
        for n in (300, 332)
        for tactic in (choose.FULL, choose.WITHOUT_WGMMA[0][1], -1)
        for launch in runner.plan(inputs_of(runner, n), tactic)
    ]
    assert len({key for key in keys if key[0] == "place"}) == 1
    products = {launch.key for launch in runner.plan(inputs_of(runner, 300), choose.FULL)}
    assert products == {launch.key for launch in runner.plan(inputs_of(runner, 332), choose.FULL)}
    assert products != {launch.key for launch in runner.plan(inputs_of(runner, 300), -1)}


def test_keys_tell_apart_what_triton_does() -> None:
    launch = Launch(sort.count, (1,), (torch.zeros(4, dtype=torch.int32),), {"CHUNK": 32})
    wider = replace(launch, args=(torch.zeros(4, dtype=torch.int64),))
    shifted = replace(launch, args=(torch.zeros(5, dtype=torch.int32)[1:],))
    other = replace(launch, meta={"CHUNK": 64})
    group = Rows(torch.zeros(4), None)
    assert replace(launch, args=(group,)).key == replace(launch, args=(Rows(torch.ones(8), None),)).key
    assert (
        replace(launch, args=(group,)).key
        != replace(launch, args=(Rows(torch.zeros(4), torch.zeros(4)),)).key
    )
    assert len({launch.key, wider.key, shifted.key, other.key}) == 4
    assert replace(launch, grid=(9,), args=(torch.ones(8, dtype=torch.int32),)).key == launch.key

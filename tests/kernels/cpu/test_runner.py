"""What the CPU backend takes, what it refuses and how it says so; its tactics and its workspace."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import Case, relative_error, run

import moestro
from moestro.errors import BackendError
from moestro.kernels.activations import SwiGLU
from moestro.kernels.cpu import CpuRunner, CpuTactic, core
from moestro.kernels.cpu import runner as runner_module


@dataclasses.dataclass(frozen=True)
class Strange(SwiGLU):
    """An activation of somebody else's."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"input_format": "int8", "weight_format": "fp8_block"}, "fp8_block"),
        ({"dtype": torch.float64}, "float64"),
        ({"weight_dtype": torch.float16}, "float16"),
        ({"input_format": "nvfp4"}, "input_format"),
        ({"hidden_size": 72}, "divisible by 16"),
        ({"activation": Strange()}, "Strange"),
    ],
)
def test_a_problem_that_it_cannot_run_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(Case().problem, **change)
    why = CpuRunner.why_not(problem)
    assert why is not None
    assert reason in why
    with pytest.raises(BackendError, match=reason):
        CpuRunner(problem, Case().weights())


def test_auto_takes_it_on_a_cpu() -> None:
    assert CpuRunner.why_not(Case().problem) is None
    layer = moestro.FusedMoE(Case().weights(), top_k=3, max_num_tokens=16)
    assert [runner.backend for runner in layer.runners] == ["cpu", "portable"]
    call = Case().call(16)
    assert relative_error(layer(*call), Case().expected(call, Case().weights())) < 4e-3


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 8, 40, 100])
def test_every_listed_tactic_runs_in_the_workspace_that_it_asks_for(fmt: str, num_tokens: int) -> None:
    case = Case(fmt)
    w, call = case.weights(), case.call(num_tokens)
    runner, expected = CpuRunner(case.problem, w), case.expected(call, w)
    tactics = [-1, *runner.get_valid_tactics([*call, None], None)]
    assert len(set(tactics)) == len(tactics) > 3
    for tactic in tactics:
        need = runner.workspace_bytes(num_tokens, tactic)
        guarded = torch.full((need + 256,), 77, dtype=torch.uint8)
        runner.use_workspace(guarded[:need])
        assert relative_error(run(runner, call, tactic), expected) < 4e-3
        assert bool((guarded[need:] == 77).all()), tactic


def test_a_workspace_that_is_too_small_is_an_error() -> None:
    runner = CpuRunner(Case().problem, Case().weights())
    runner.use_workspace(torch.empty(runner.workspace_bytes(9, -1) - 64, dtype=torch.uint8))
    with pytest.raises(BackendError, match="workspace has"):
        run(runner, Case().call(9))


def test_tactics_come_back_from_json() -> None:
    runner = CpuRunner(Case().problem, Case().weights())
    for tactic in runner.get_valid_tactics([*Case().call(100), None], None):
        assert CpuTactic(**dataclasses.asdict(tactic)) == tactic


@pytest.mark.parametrize("tactic", [("few", 1), CpuTactic(0, 1), CpuTactic(1, 1, wave=-1)])
def test_what_is_no_tactic_is_an_error(tactic: Any) -> None:
    with pytest.raises(BackendError, match="tactic must"):
        run(CpuRunner(Case().problem, Case().weights()), Case().call(2), tactic)


def test_an_instruction_set_that_is_unknown_or_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(core.ISA_VARIABLE, "avx521")
    with pytest.raises(BackendError, match="avx512"):
        core.choose_isa()
    monkeypatch.setattr(core, "available_isas", lambda: ("generic",))
    monkeypatch.setenv(core.ISA_VARIABLE, "amx")
    with pytest.raises(BackendError, match="this machine has generic"):
        core.choose_isa()
    monkeypatch.delenv(core.ISA_VARIABLE)
    assert core.choose_isa() == "generic"


def test_concurrent_calls_of_two_runners_do_not_mix() -> None:
    case = Case()
    w, calls = case.weights(), [case.call(23, seed) for seed in range(2)]
    runners = [CpuRunner(case.problem, w) for _ in calls]
    expected = [run(runner, call) for runner, call in zip(runners, calls, strict=True)]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(50):
            if not torch.equal(expected[i], run(runners[i], calls[i])):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_takes_as_many_threads_as_find_work(
    monkeypatch: pytest.MonkeyPatch, set_torch_threads: Callable[[int], None]
) -> None:
    case = Case("bf16")
    pair = 3 * case.hidden * case.inter
    monkeypatch.setattr(runner_module, "WORK_OF_A_THREAD", 5 * case.problem.top_k * pair)
    runner, calls = CpuRunner(case.problem, case.weights()), {n: case.call(n) for n in (1, 9, 10, 40)}
    found = {}
    set_torch_threads(3)
    for n, call in calls.items():
        runner._cuts_cache.clear()
        assert relative_error(run(runner, call), case.expected(call, case.weights())) < 4e-3
        found[n] = {cut.threads for cut in runner._cuts_cache.values()}
    assert found == {1: {1}, 9: {1}, 10: {2}, 40: {3}}


def test_threads_of_its_own_where_there_is_no_openmp() -> None:
    case = Case(hidden=160, inter=112)
    runner, call = CpuRunner(case.problem, case.weights()), case.call(41)
    expected = run(runner, call)
    address = core._gomp_parallel()
    core.load().moestro_cpu_use_openmp(None)
    try:
        results = [run(runner, call) for _ in range(20)]
    finally:
        core.load().moestro_cpu_use_openmp(address)
    assert all(torch.equal(expected, y) for y in results)


def test_without_a_core_the_backend_says_so_and_portable_runs() -> None:
    code = (
        "import torch, moestro\n"
        "from moestro.kernels import backends\n"
        "w = moestro.ExpertWeights.from_dense(torch.randn(4, 64, 32), torch.randn(4, 32, 32), 'nvfp4')\n"
        "x, ids = torch.randn(3, 32).bfloat16(), torch.zeros(3, 1, dtype=torch.int32)\n"
        "layer = moestro.FusedMoE(w, top_k=1)\n"
        "print(layer.runners[0].backend, backends.why_not('cpu', layer.runners[0].problem))\n"
        "assert layer(x, ids, torch.ones(3, 1)).isfinite().all()\n"
    )
    env = {**os.environ, "MOESTRO_CPU_CORE": "/nowhere/_core.so"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("portable")
    assert "cannot be loaded" in done.stdout
    assert (
        done.stderr.count("the portable backend runs nvfp4 weights") == 1
    )  # once, for the layer and its call


FORKED = """
import os, signal, sys, torch, moestro
torch.set_num_threads(2)
w = moestro.ExpertWeights.from_dense(torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16(), "bf16")
x, (ids, weights) = torch.randn(33, 64).bfloat16(), moestro.route(torch.randn(33, 4), 2)
layer = moestro.FusedMoE(w, top_k=2, backend="cpu")
expected = layer(x, ids, weights)
child = os.fork()
if child == 0:
    signal.alarm(30)
    y = layer(x, ids, weights)
    os._exit(0 if bytes(y.view(torch.uint8).numpy()) == bytes(expected.view(torch.uint8).numpy()) else 3)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_layer_runs_in_a_forked_child(tmp_path: Path) -> None:
    environment = {**os.environ, "MOESTRO_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fields", [(2**31, 1), (64, 2**31), (64, 1, 2**31), (64, 1, 16, 2**40)])
def test_a_tactic_beyond_what_the_core_holds_is_refused(fields: tuple[int, ...]) -> None:
    w = moestro.ExpertWeights.from_dense(torch.randn(2, 64, 64), torch.randn(2, 64, 32), "nvfp4")
    x, (ids, weights) = torch.randn(3, 64).bfloat16(), moestro.route(torch.randn(3, 2), 1)
    with pytest.raises(BackendError, match="tactic must have fields of at most"):
        moestro.fused_moe(x, ids, weights, w, backend="cpu", tactic=CpuTactic(*fields))

"""One layer, function and weights from many threads: every result is that of its own call."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from moe_cases import make_call, make_weights

from moestro import FusedMoE, errors, fused_moe
from moestro.kernels import backends
from moestro.moe.options import Options, make_problem

THREADS, CALLS = 8, 200
HERE = [
    name
    for name in backends.BACKENDS
    if backends.why_not(name, make_problem(make_weights("bf16"), Options(), top_k=2, dtype=torch.bfloat16))
    is None
]

# In a process of its own: what this is about used to be a segmentation fault.
STRESS = """
import faulthandler, sys, threading
faulthandler.dump_traceback_later(240, exit=True)
sys.path.insert(0, {tests!r})
import torch
from moe_cases import make_call
from moestro import ExpertWeights, FusedMoE, fused_moe
torch.set_num_threads({torch_threads})
sys.setswitchinterval(1e-5)
backend, threads, calls, hidden = {backend!r}, {threads}, {calls}, {hidden}
dense = [(torch.randn(6, *shape) / 16).bfloat16() for shape in ((2 * hidden, hidden), (hidden, hidden))]
w = ExpertWeights.from_dense(*dense, {fmt!r})
layer = FusedMoE(w, 2, 128, backend=backend, use_cuda_graph={graph})
given = [make_call(n, hidden=hidden, experts=6, top_k=2, seed=n) for n in {sizes}]
plain = {{"backend": backend, "deterministic": True}}
alone = [layer(*call).clone() for call in given]
function = [fused_moe(*call, w, **plain) for call in given]
wrong, done = [], []
def work(i):
    for r in range(calls):
        which = (i + r) % len(given)
        if r % 2:
            same = torch.equal(layer(*given[which]), alone[which])
        else:
            same = torch.equal(fused_moe(*given[which], w, **plain), function[which])
        if not same:
            wrong.append((i, r))
    done.append(i)
workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
[t.start() for t in workers]
[t.join() for t in workers]
print(len(wrong), "of", threads * calls, "wrong;", len(done), "threads came back")
sys.exit(bool(wrong) or len(done) < threads)
"""


def stress(backend: str, **more: Any) -> None:
    values = {"tests": str(__import__("pathlib").Path(__file__).parent), "backend": backend, "threads": THREADS,
              "calls": CALLS, "torch_threads": 1, "fmt": "nvfp4", "graph": False, "hidden": 256,
              "sizes": (1, 3, 17, 64, 100), **more}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STRESS.format(**values)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])


@pytest.mark.parametrize("backend", HERE)
def test_results_of_one_layer_and_function_in_eight_threads_are_exact(backend: str) -> None:
    small: dict[str, Any] = {"hidden": 64, "sizes": (1, 2, 9)} if backend == "portable" else {}
    stress(backend, **small)


def test_and_where_each_call_has_threads_of_its_own() -> None:
    stress("auto", torch_threads=2, calls=CALLS // 4)


def test_and_those_of_a_layer_that_owns_its_output() -> None:
    stress("auto", graph=True, fmt="bf16", calls=CALLS // 2)


def test_an_experts_module_of_transformers_in_eight_threads() -> None:
    moestro_hf = pytest.importorskip("moestro.integrations.transformers")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    moestro_hf.register("threads", deterministic=True)
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=2)
    module = Qwen3MoeExperts(config).bfloat16().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    module.config._experts_implementation = "threads"
    given = [make_call(n, hidden=64, experts=6, top_k=2, seed=n) for n in (1, 3, 17, 40)]
    with torch.no_grad():
        alone = [module(x, ids.long(), weights) for x, ids, weights in given]
    results: list[bool] = []

    @torch.no_grad()
    def work(i: int) -> None:
        for r in range(CALLS):
            x, ids, weights = given[(i + r) % len(given)]
            results.append(torch.equal(module(x, ids.long(), weights), alone[(i + r) % len(given)]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    [t.start() for t in workers]
    [t.join() for t in workers]
    assert results.count(True) == THREADS * CALLS


def test_weights_written_by_one_thread_while_others_call() -> None:
    """The cpu backend packs anew: no call may be left with memory that is gone."""
    w = make_weights("bf16", experts=6)
    call = make_call(9, experts=6, top_k=2)
    layer, stop, failures = FusedMoE(w, 2, 16, backend="auto"), threading.Event(), []
    bound = fused_moe  # on checkpoint weights, whose writes are seen

    def read() -> None:
        while not stop.is_set():
            try:
                assert torch.isfinite(bound(*call, w)).all()
                layer(*call)
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    [t.start() for t in readers]
    for _ in range(30):
        w.down.data.mul_(1.0)  # type: ignore[attr-defined]
        fused_moe(*call, w)
    stop.set()
    [t.join() for t in readers]
    assert failures == []


def test_a_call_that_fails_leaves_the_others_alone() -> None:
    layer = FusedMoE(make_weights(experts=6), 2, 128)
    call, held = make_call(9, experts=6, top_k=2), []
    expected = layer(*call)

    def work() -> None:
        for r in range(50):
            if r % 2:
                with pytest.raises(errors.ShapeError):
                    layer(call[0][:, :8], *call[1:])
            held.append(torch.equal(layer(*call), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in workers]
    [t.join() for t in workers]
    assert held == [True] * 200


def test_memory_is_for_calls_in_flight_not_for_layers() -> None:
    """Scratch of a model is that of its largest layer, however many there are."""
    w = make_weights("bf16")
    layers = [FusedMoE(w, 3, 64, backend="portable", tactic="loop") for _ in range(12)]
    call = make_call(64)
    layers[0](*call)
    workspace = layers[0].workspace
    of_one = workspace.nbytes
    for layer in layers:
        layer(*call)
    assert all(layer.workspace is workspace for layer in layers)
    assert workspace.nbytes == of_one >= layers[0].runners[0].workspace_bytes(64, "loop")

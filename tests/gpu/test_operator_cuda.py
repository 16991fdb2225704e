"""The operator's portable backend on a CUDA device: values, capture in a graph, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro import ExpertWeights, FusedMoE, fused_moe, reference
from moestro.tuning import AutoTuner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

E, K, H, I = 16, 4, 96, 160  # noqa: E741
TACTICS: list[Any] = [-1, "loop", ("pairs", 3), ("grouped", 4), ("grouped", 0), ("masked", 4)]


@pytest.fixture(autouse=True)
def default_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoTuner, "_default", AutoTuner())


def make(
    fmt: str, num_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[ExpertWeights, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(num_tokens)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) * 0.2, torch.randn(E, H, I, generator=g) * 0.2
    dense = dtype if fmt == "bf16" else torch.float32
    w = ExpertWeights.from_dense(gate_up.to(dense).cuda(), down.to(dense).cuda(), fmt)
    x = torch.randn(num_tokens, H, generator=g).to(dtype)
    ids = torch.rand(num_tokens, E, generator=g).argsort(-1)[:, :K].int().contiguous()
    return w, [t.cuda() for t in (x, ids, torch.rand(num_tokens, K, generator=g))]


def error(y: torch.Tensor, call: list[torch.Tensor], w: ExpertWeights, **options: Any) -> float:
    expected = reference.fused_moe(*call, w, **options)
    return float((y.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "mxfp4", "fp8_block"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_tactics_equal_the_reference(tactic: Any, fmt: str, deterministic: bool) -> None:
    for num_tokens in (1, 17, 257):
        w, call = make(fmt, num_tokens)
        runner = FusedMoE(w, K, backend="portable").runners[0]
        options: dict[str, Any] = {"backend": "portable", "deterministic": deterministic}
        if tactic != -1:
            name, knob = (tactic, 1) if isinstance(tactic, str) else tactic
            if runner.unfit((name, knob), num_tokens) is not None:  # type: ignore[attr-defined]
                continue
            options["tactic"] = tactic
        y = fused_moe(*call, w, **options)
        assert error(y, call, w) < 1e-2
        if deterministic:
            assert torch.equal(y, fused_moe(*call, w, **options))


@pytest.mark.parametrize("backend", ["portable", "auto"])
@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_a_layer_is_captured_at_several_sizes(fmt: str, backend: str) -> None:
    w, _ = make(fmt, 1)
    layer = FusedMoE(w, K, 64, use_cuda_graph=True, backend=backend)
    for num_tokens in (64, 1, 17):
        _, call = make(fmt, num_tokens)
        layer(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(*call)
        _, other = make(fmt, num_tokens)
        call[0].copy_(other[0].flip(0))
        y.fill_(torch.nan)
        graph.replay()
        assert error(y, call, w) < 1e-2


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_a_graph_layer_never_synchronises(fmt: str) -> None:
    w, call = make(fmt, 33)
    layer = FusedMoE(w, K, 64, use_cuda_graph=True, backend="portable")
    layer(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tactic in layer.runners[0].get_valid_tactics(call, None):
            layer.runners[0].forward([*call, torch.empty_like(call[0])], tactic)
        layer(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_quantised_activations() -> None:
    for fmt in ("bf16", "nvfp4"):
        w, call = make(fmt, 33)
        y = fused_moe(*call, w, input_format="nvfp4", backend="portable")
        assert error(y, call, w, input_format="nvfp4") < 1e-2

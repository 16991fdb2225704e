"""Layers and weights can be copied, and weights made expert by expert are those made at once."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import moestro
from moestro.errors import BackendError, ShapeError

E, K, H, I = 4, 2, 64, 32  # noqa: E741


def dense() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    gate_up = torch.randn(E, 2 * I, H, generator=g).bfloat16() / 8
    return gate_up, torch.randn(E, H, I, generator=g).bfloat16() / 6


def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    return x, torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32), torch.ones(3, K)


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_a_deep_copy_of_a_layer_that_has_run_gives_the_same_from_weights_of_its_own(backend: str) -> None:
    layer = moestro.FusedMoE(moestro.ExpertWeights.from_dense(*dense()), top_k=K, backend=backend).eval()
    y = layer(*call())
    twin = copy.deepcopy(torch.nn.ModuleList([layer]))[0]
    assert isinstance(twin, moestro.FusedMoE)
    assert torch.equal(y, twin(*call()))
    assert twin.options == layer.options
    assert not twin.training
    shared = {t.data_ptr() for t in twin.weights.tensors} & {t.data_ptr() for t in layer.weights.tensors}
    assert shared == set()


def test_weights_that_have_run_can_be_copied_and_saved() -> None:
    w = moestro.ExpertWeights.from_dense(*dense(), format="bf16")
    y = moestro.fused_moe(*call(), w)
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    for again in (copy.deepcopy(w), torch.load(file, weights_only=False)):
        assert torch.equal(y, moestro.fused_moe(*call(), again))


@pytest.mark.parametrize("format", ["nvfp4", "bf16", "fp8_block", "int4"])
def test_a_packed_tensor_can_be_pickled_without_its_layer(format: str) -> None:
    w = moestro.ExpertWeights.from_dense(*dense(), format=format, backend="cpu")
    assert w.layout != "checkpoint"
    again = pickle.loads(pickle.dumps((w.gate_up, w.down)))
    assert [type(part) for part in again] == [type(w.gate_up), type(w.down)]
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(again, w.dequantize(), strict=True))


@pytest.mark.parametrize("format", ["nvfp4", "bf16", "mxfp4"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "portable"])
def test_quantising_straight_into_a_backends_layout_gives_the_same_weights(format: str, backend: str) -> None:
    plain = moestro.ExpertWeights.from_dense(*dense(), format=format)
    w = moestro.ExpertWeights.from_dense(*dense(), format=format, backend=backend)
    assert (w.layout == "checkpoint") == (backend == "portable")
    assert all(torch.equal(a, b) for a, b in zip(w.dequantize(), plain.dequantize(), strict=True))
    assert torch.equal(
        moestro.fused_moe(*call(), w, backend=backend), moestro.fused_moe(*call(), plain, backend=backend)
    )


def test_experts_without_a_gate_and_with_biases() -> None:
    gate_up, down = dense()
    bias = torch.randn(E, I)
    w = moestro.ExpertWeights.from_dense(gate_up[:, :I], down, backend="auto", gate_up_bias=bias)
    assert not w.gated
    assert w.gate_up_bias is bias


def test_what_does_not_fit_is_an_error() -> None:
    gate_up, down = dense()
    with pytest.raises(ShapeError, match="4 experts"):
        moestro.ExpertWeights.from_dense(gate_up, down[:3], backend="auto")
    with pytest.raises(BackendError, match="mxfp8"):
        moestro.ExpertWeights.from_dense(gate_up, down, "mxfp8", backend="cpu")
    with pytest.raises(TypeError, match="bias"):
        moestro.ExpertWeights.from_experts([], "cpu", bias=down)


@pytest.mark.parametrize("format", ["nvfp4", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("graph", [False, True])
def test_a_model_that_holds_layers_can_be_saved_and_pickled(format: str, backend: str, graph: bool) -> None:
    """torch.save, multiprocessing, Ray: with the layer's bound calls, scratch memory and tuner left behind."""
    w = moestro.ExpertWeights.from_dense(*dense(), format=format)
    model = torch.nn.Sequential(moestro.FusedMoE(w, K, 16, graph, backend=backend, deterministic=True)).eval()
    model[0].name_of_mine = "kept"
    y = model[0](*call()).clone()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for back in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(back[0](*call()), y)
        assert (back[0].options, back[0].top_k, back[0].training) == (model[0].options, K, False)
        assert back[0].name_of_mine == "kept"
        assert back[0].weights.layout == model[0].weights.layout
    assert torch.equal(model[0](*call()), y)


def test_a_copy_has_its_layers_hooks_and_tuner() -> None:
    layer = moestro.FusedMoE(moestro.ExpertWeights.from_dense(*dense()), K, 16, tuner=moestro.AutoTuner())
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    twin = copy.deepcopy(layer)
    assert twin.tuner is layer.tuner
    twin(*call())
    assert seen == [1]

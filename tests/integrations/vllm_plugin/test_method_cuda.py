"""Our method class on a GPU, against stand-ins for the rest of vLLM: numbers, and calls captured in CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stand_ins import (
    Config,
    Dense,
    MoEActivation,
    Parallel,
    RoutedExperts,
    load,
    method_classes,
    quant_config,
)

import moestro
from moestro.integrations.vllm import hooks, kinds, ranks
from moestro.integrations.vllm.settings import Settings
from moestro.kernels.activations import SwiGLU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"hidden_dim": 256, "intermediate_size_per_partition": 128, "num_experts": 8, "num_local_experts": 8}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "link", lambda moe: None)


def make(name: str, moe: Config) -> tuple[RoutedExperts, tuple[torch.Tensor, torch.Tensor]]:
    """A processed layer on the GPU, and (gate_up, down) that it stands for."""
    cls = getattr(method_classes(), name)
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    with torch.device("cuda"):
        layer = RoutedExperts(cls(quant_config(), moe) if name == "nvfp4" else cls(moe))
    assert type(layer.quant_method) is not cls, "left to vLLM"
    dense = Dense.random(moe)
    if name == "nvfp4":
        tensors, values = dense.nvfp4(), dense.nvfp4_values()
    elif name == "mxfp4":
        tensors, values = dense.mxfp4(), dense.mxfp4_values()
    else:
        values = (torch.cat([dense.gate, dense.up], 1).bfloat16(), dense.down.bfloat16())
        tensors = {"w13_weight": values[0], "w2_weight": values[1]}
    load(layer, **tensors)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, (values[0].float(), values[1].float())


@pytest.mark.parametrize("name", ["nvfp4", "bf16", "mxfp4"])
def test_eager_and_captured_calls_equal_the_reference(name: str) -> None:
    activation = MoEActivation.SWIGLUOAI if name == "mxfp4" else MoEActivation.SILU
    moe = Config(device="cuda", activation=activation, max_capture_size=64, **SIZES)  # type: ignore[arg-type]
    layer, values = make(name, moe)
    assert layer.quant_method.experts.use_cuda_graph
    assert layer.quant_method.experts.runners[0].backend == "triton"
    w = moestro.ExpertWeights.from_dense(*values, format="bf16")
    ours = SwiGLU(1.702, 7.0, 1.0) if name == "mxfp4" else SwiGLU()
    for num_tokens in (0, 1, 16, 64):
        x = torch.randn(num_tokens, moe.hidden_dim, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.randn(num_tokens, moe.num_experts, device="cuda").softmax(-1).topk(2)
        ids = ids.int()  # as vLLM's router hands them over
        expected = moestro.reference.fused_moe(x.cpu().float(), ids.cpu(), weights.cpu(), w, activation=ours)
        near(expected, layer.quant_method.apply(layer, x, weights, ids, None, None))
        if not num_tokens:
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.quant_method.apply(layer, x, weights, ids, None, None)
        graph.replay()
        near(expected, captured)
        ids.copy_(ids.flip(1))  # other inputs in the same memory
        weights.copy_(weights.flip(1))
        x.mul_(-0.5)
        expected = moestro.reference.fused_moe(x.cpu().float(), ids.cpu(), weights.cpu(), w, activation=ours)
        graph.replay()
        near(expected, captured)


def test_a_captured_rank_of_expert_parallelism_sums_its_own_experts() -> None:
    moe = dataclasses.replace(
        Config(device="cuda", max_capture_size=64, **SIZES),  # type: ignore[arg-type]
        num_local_experts=4,
        moe_parallel_config=Parallel(ep_size=2, use_ep=True),
    )
    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, -1], dtype=torch.int32, device="cuda")
    with torch.device("cuda"):
        layer = RoutedExperts(cls(quant_config(), moe), expert_map=expert_map)
    dense = Dense.random(moe, experts=4)
    load(layer, **dense.nvfp4())
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(16, moe.hidden_dim, device="cuda", dtype=torch.bfloat16)
    weights, ids = torch.randn(16, 8, device="cuda").softmax(-1).topk(2)
    ids = ids.int()
    layer.quant_method.apply(layer, x, weights, ids, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.quant_method.apply(layer, x, weights, ids, None, None)
    graph.replay()
    w = moestro.ExpertWeights.from_dense(*dense.nvfp4_values(), format="bf16")
    local = expert_map.cpu()[ids.cpu().long()]
    near(moestro.reference.fused_moe(x.cpu().float(), local, weights.cpu(), w), captured)


def near(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual.cpu().float() - expected).abs().max()) <= 2e-2 * float(expected.abs().max())

"""Weights of our method class: given back, checked, loaded anew."""

from __future__ import annotations

import pytest
import torch
from method_cases import assert_near, call, inputs, make_layer, truth
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
from moestro.errors import BackendError, FormatError
from moestro.integrations.vllm import hooks, kinds
from moestro.integrations.vllm.settings import Settings

pytestmark = pytest.mark.usefixtures("by_itself")


def test_vllms_parameters_are_given_back_and_one_copy_is_kept() -> None:
    moe = Config()
    layer = make_layer(moe, "nvfp4", Dense.random(moe).nvfp4())
    assert {name: p.numel() for name, p in layer.named_parameters() if p.numel()} == {}
    packed = moe.num_experts * 3 * moe.hidden_dim * moe.intermediate_size_per_partition * 9 // 16
    assert packed <= layer.quant_method.experts.weights.nbytes <= 1.2 * packed


@pytest.mark.parametrize(("name", "at"), [("w13_weight_scale_2", (2, 1)), ("w2_weight_scale", (3, 5, 0))])
def test_a_scale_that_the_checkpoint_does_not_have_is_an_error_that_names_it(
    name: str, at: tuple[int, ...]
) -> None:
    moe = Config()
    tensors = Dense.random(moe).nvfp4()
    tensors[name] = tensors[name].float()
    tensors[name][at] = torch.nan
    tensors[name] = tensors[name].to(torch.float8_e4m3fn if name.endswith("scale") else torch.float32)
    with pytest.raises(
        FormatError, match=rf"mlp\.experts: every expert must have .* {name}, got none .*experts {at[0]}$"
    ):
        make_layer(moe, "nvfp4", tensors)


def test_nothing_loaded_for_a_scale_is_seen_by_its_global_number() -> None:
    moe = Config(num_local_experts=2, moe_parallel_config=Parallel(ep_size=2, use_ep=True))
    tensors = Dense.random(moe, experts=2).nvfp4()
    del tensors["w2_weight_scale_2"]
    with pytest.raises(FormatError, match=r"w2_weight_scale_2, got none .* for experts 3, 1$"):
        make_layer(moe, "nvfp4", tensors, expert_map=torch.tensor([-1, 1, -1, 0], dtype=torch.int32))


def test_missing_mxfp4_scales_are_seen() -> None:
    tensors = Dense.random(Config()).mxfp4()
    del tensors["w13_weight_scale"]
    with pytest.raises(FormatError, match="for experts 0, 1, 2, 3"):
        make_layer(Config(activation=MoEActivation.SWIGLUOAI), "mxfp4", tensors)


def test_a_reload_serves_the_new_weights() -> None:
    moe = Config()
    layer = make_layer(moe, "nvfp4", Dense.random(moe).nvfp4())
    method, expert_map = layer.quant_method, layer.expert_map
    again = RoutedExperts(method, expert_map)  # vLLM restores the parameters, then loads and processes
    other = Dense.random(moe, seed=7)
    load(again, **other.nvfp4())
    method.process_weights_after_loading(again)
    x, weights, ids = inputs(moe, 5)
    assert_near(truth(other.nvfp4_values(), x, weights, ids), call(again, x, weights, ids))


def test_a_reload_under_cuda_graphs_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = Config()
    layer = make_layer(moe, "nvfp4", Dense.random(moe).nvfp4())
    monkeypatch.setattr(type(layer.quant_method), "_graphs", lambda self: True)
    again = RoutedExperts(layer.quant_method)
    with pytest.raises(BackendError, match="must not be reloaded where CUDA graphs"):
        layer.quant_method.process_weights_after_loading(again)


def test_a_layer_that_vllm_asks_twice_for_is_packed_once() -> None:
    layer = make_layer(Config(), "nvfp4", Dense.random(Config()).nvfp4())
    made = layer.quant_method.experts
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.experts is made


def test_a_call_before_loading_is_an_error() -> None:
    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    layer = RoutedExperts(cls(quant_config(), Config()))
    with pytest.raises(BackendError, match="must be loaded and processed"):
        call(layer, *inputs(Config(), 2))


def test_dense_experts_are_quantised_at_load_where_that_is_asked_for() -> None:
    moe = Config()
    dense = Dense.random(moe)
    gate_up, down = torch.cat([dense.gate, dense.up], 1).bfloat16(), dense.down.bfloat16()
    cls = method_classes().bf16
    ours = hooks.subclass(cls, kinds.KINDS[cls.__name__], Settings())
    ours.quantize_to = "nvfp4"  # type: ignore[attr-defined]
    layer = RoutedExperts(ours(moe))
    load(layer, w13_weight=gate_up, w2_weight=down)
    layer.quant_method.process_weights_after_loading(layer)
    held = layer.quant_method.experts.weights
    expected = moestro.ExpertWeights.from_dense(gate_up, down, format="nvfp4").dequantize()
    assert held.format == "nvfp4"
    assert all(torch.equal(a, b) for a, b in zip(held.dequantize(), expected, strict=True))

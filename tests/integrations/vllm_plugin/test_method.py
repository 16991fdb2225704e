"""Our method class against stand-ins of vLLM's: numbers and ranks (weights: test_method_weights.py)."""

from __future__ import annotations

import dataclasses
import sys
import types
from types import SimpleNamespace
from typing import Any

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
from moestro.errors import RoutingError
from moestro.formats import NVFP4, FP8Block
from moestro.integrations.vllm import execute, hooks, kinds
from moestro.integrations.vllm.settings import Settings
from moestro.kernels.activations import SwiGLU

pytestmark = pytest.mark.usefixtures("by_itself")


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
def test_nvfp4_experts_equal_the_dequantised_ones_with_the_gates_and_ups_own_global_scales(
    num_tokens: int,
) -> None:
    moe = Config()
    dense = Dense.random(moe)
    layer = make_layer(moe, "nvfp4", dense.nvfp4())
    x, weights, ids = inputs(moe, num_tokens)
    y = call(layer, x, weights, ids)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert_near(truth(dense.nvfp4_values(), x, weights, ids), y)


def test_more_tokens_than_the_scheduler_promised_are_served_in_parts() -> None:
    moe = Config(max_num_tokens=16)
    dense = Dense.random(moe)
    x, weights, ids = inputs(moe, 50)
    assert_near(
        truth(dense.nvfp4_values(), x, weights, ids),
        call(make_layer(moe, "nvfp4", dense.nvfp4()), x, weights, ids),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    moe = Config(in_dtype=dtype)
    dense = Dense.random(moe)
    x, weights, ids = inputs(moe, 5)
    y = call(make_layer(moe, "nvfp4", dense.nvfp4()), x, weights, ids)
    assert y.dtype == dtype
    assert_near(truth(dense.nvfp4_values(), x, weights, ids), y)


def test_gpt_oss_experts_have_alternating_rows_biases_and_the_clamped_activation() -> None:
    moe = Config(activation=MoEActivation.SWIGLUOAI, has_bias=True)
    dense = Dense.random(moe)
    make = torch.Generator().manual_seed(3)
    inter = moe.intermediate_size_per_partition
    bias = torch.randn(moe.num_experts, 2 * inter, generator=make).bfloat16()  # gate rows first
    down_bias = torch.randn(moe.num_experts, moe.hidden_dim, generator=make).bfloat16()
    alternating = torch.stack([bias[:, :inter], bias[:, inter:]], 2).flatten(1)
    layer = make_layer(moe, "mxfp4", {**dense.mxfp4(), "w13_bias": alternating, "w2_bias": down_bias})
    x, weights, ids = inputs(moe, 9)
    options = {
        "activation": SwiGLU(1.702, 7.0, 1.0),
        "gate_up_bias": bias.float(),
        "down_bias": down_bias.float(),
    }
    assert_near(truth(dense.mxfp4_values(), x * 4, weights, ids, **options), call(layer, x * 4, weights, ids))


def test_a_clamp_of_plain_silu_and_the_free_form_are_kept() -> None:
    for activation, ours in (
        (Config(swiglu_limit=0.5), SwiGLU(limit=0.5)),
        (
            Config(
                activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE,
                swiglu_alpha=1.3,
                swiglu_limit=0.7,
                swiglu_beta=0.25,
            ),
            SwiGLU(1.3, 0.7, 0.25),
        ),
    ):
        dense = Dense.random(activation)
        x, weights, ids = inputs(activation, 6)
        expected = truth(dense.nvfp4_values(), x, weights, ids, activation=ours)
        assert_near(expected, call(make_layer(activation, "nvfp4", dense.nvfp4()), x, weights, ids))


def test_bf16_experts() -> None:
    moe = Config()
    dense = Dense.random(moe)
    gate_up, down = torch.cat([dense.gate, dense.up], 1).bfloat16(), dense.down.bfloat16()
    layer = make_layer(moe, "bf16", {"w13_weight": gate_up, "w2_weight": down})
    x, weights, ids = inputs(moe, 12)
    assert_near(truth((gate_up.float(), down.float()), x, weights, ids), call(layer, x, weights, ids))


def test_fp8_experts_in_blocks() -> None:
    moe = Config(hidden_dim=256, intermediate_size_per_partition=128)
    dense = Dense.random(moe)
    gate_up, down = FP8Block.quantize(torch.cat([dense.gate, dense.up], 1)), FP8Block.quantize(dense.down)
    cls = method_classes().fp8_block
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    config = SimpleNamespace(
        is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128], activation_scheme="dynamic"
    )
    method = cls(config, SimpleNamespace(moe_config=moe))
    if type(method) is cls:
        pytest.skip("no kernel of ours runs FP8 blocks on this CPU")
    layer = RoutedExperts(method)
    load(layer, w13_weight=gate_up.data, w13_weight_scale_inv=gate_up.scale_inv)
    load(layer, w2_weight=down.data, w2_weight_scale_inv=down.scale_inv)
    method.process_weights_after_loading(layer)
    x, weights, ids = inputs(moe, 9)
    values = (gate_up.dequantize(torch.float32), down.dequantize(torch.float32))
    assert_near(truth(values, x, weights, ids), call(layer, x, weights, ids))


def test_batch_invariant_rows_where_vllm_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.envs", types.SimpleNamespace(VLLM_BATCH_INVARIANT=True))  # type: ignore[arg-type]
    moe = Config()
    layer = make_layer(moe, "nvfp4", Dense.random(moe).nvfp4())
    assert layer.quant_method.experts.options.batch_invariant
    x, weights, ids = inputs(moe, 40)
    together = call(layer, x, weights, ids)
    alone = [call(layer, x[n : n + 1], weights[n : n + 1], ids[n : n + 1]) for n in range(40)]
    assert torch.equal(together, torch.cat(alone))


def test_ranks_of_any_placement_sum_to_the_whole() -> None:
    whole = Config(num_experts=6)
    dense = Dense.random(whole, experts=6)
    x, weights, ids = inputs(whole, 20)
    ids[0, 0] = -1  # a padded token's
    placements = ([4, 0, 5], [2, 1], [3])
    total = torch.zeros(x.shape)
    for experts in placements:
        moe = dataclasses.replace(
            whole, num_local_experts=len(experts), moe_parallel_config=Parallel(ep_size=3, use_ep=True)
        )
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[torch.tensor(experts)] = torch.arange(len(experts), dtype=torch.int32)
        mine = {
            name: t[torch.tensor(experts)]
            if t.dtype != torch.float8_e4m3fn
            else t.view(torch.uint8)[torch.tensor(experts)].view(t.dtype)
            for name, t in dense.nvfp4().items()
        }
        total += call(make_layer(moe, "nvfp4", mine, expert_map=expert_map), x, weights, ids).float()
    assert_near(truth(dense.nvfp4_values(), x, weights, ids), total)


def test_one_expert_a_rank_with_top_k_two() -> None:
    moe = Config(num_local_experts=1, moe_parallel_config=Parallel(ep_size=4, use_ep=True))
    dense = Dense.random(moe, experts=1)
    expert_map = torch.tensor([-1, -1, 0, -1], dtype=torch.int32)
    layer = make_layer(moe, "nvfp4", dense.nvfp4(), expert_map=expert_map)
    x, weights, ids = inputs(moe, 8)
    local = torch.where(ids == 2, 0, -1)
    assert_near(truth(dense.nvfp4_values(), x, weights, local), call(layer, x, weights, ids))


def test_shares_of_the_intermediate_size_sum_to_the_whole() -> None:
    whole = Config(intermediate_size_per_partition=64)
    dense = Dense.random(whole)
    x, weights, ids = inputs(whole, 11)
    total, expected = torch.zeros(x.shape), torch.zeros(x.shape)
    for rank in range(2):
        moe = dataclasses.replace(
            whole, intermediate_size_per_partition=32, moe_parallel_config=Parallel(tp_size=2)
        )
        rows = slice(32 * rank, 32 * rank + 32)
        share = Dense(dense.gate[:, rows], dense.up[:, rows], dense.down[:, :, rows])
        total += call(make_layer(moe, "nvfp4", share.nvfp4()), x, weights, ids).float()
        expected += truth(share.nvfp4_values(), x, weights, ids)
    assert_near(expected, total)


def test_router_weights_on_the_input() -> None:
    moe = Config(experts_per_token=1)
    dense = Dense.random(moe)
    layer = make_layer(moe, "nvfp4", dense.nvfp4(), weight_on_input=True)
    x, weights, ids = inputs(moe, 9)
    scaled = x * weights.to(x.dtype)
    expected = truth(dense.nvfp4_values(), scaled, torch.ones_like(weights), ids)
    assert_near(expected, call(layer, x, weights, ids))


def test_router_weights_on_the_input_of_two_experts_are_an_error() -> None:
    with pytest.raises(RoutingError, match="top_k 1, got 2"):
        make_layer(Config(), "nvfp4", Dense.random(Config()).nvfp4(), weight_on_input=True)


def test_w4a4_is_quantised_when_asked_for_with_the_calibrated_scales() -> None:
    moe = Config()
    dense = Dense.random(moe)
    scales = {"w13_input_scale": torch.full((4, 2), 2e-3), "w2_input_scale": torch.full((4,), 1e-3)}
    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings(quantize_input=True))
    layer = RoutedExperts(cls(quant_config("NVFP4"), moe))
    load(layer, **dense.nvfp4(), **scales)
    layer.quant_method.process_weights_after_loading(layer)
    w = layer.quant_method.experts.weights
    assert layer.quant_method.experts.options.input_format == "nvfp4"
    assert torch.equal(w.gate_up_input_scale, torch.full((4,), 2e-3))
    x, weights, ids = inputs(moe, 9)
    values = moestro.ExpertWeights.from_dense(*dense.nvfp4_values(), format="bf16")
    scaled = dataclasses.replace(
        values, gate_up_input_scale=w.gate_up_input_scale, down_input_scale=w.down_input_scale
    )
    expected = moestro.reference.fused_moe(x.float(), ids, weights, scaled, input_format="nvfp4")
    assert_near(expected, call(layer, x, weights, ids))


def test_w4a4_stays_in_16_bits_on_a_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    layer = RoutedExperts(cls(quant_config("NVFP4"), Config()))
    load(layer, **Dense.random(Config()).nvfp4())
    with caplog.at_level("INFO", logger="vllm.moestro"):
        layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.experts.options.input_format is None
    assert "activations of this W4A4 checkpoint stay in torch.bfloat16" in caplog.text


def test_negative_block_scales_as_of_dummy_weights_keep_their_values() -> None:
    moe = Config()
    dense = Dense.random(moe)
    tensors = dense.nvfp4()
    tensors["w13_weight_scale"].view(torch.uint8)[1, ::3, 1] |= 0x80
    gate_up = NVFP4(
        tensors["w13_weight"], tensors["w13_weight_scale"], tensors["w13_weight_scale_2"]
    ).dequantize()
    x, weights, ids = inputs(moe, 9)
    expected = truth((gate_up, dense.nvfp4_values()[1]), x, weights, ids)
    assert_near(expected, call(make_layer(moe, "nvfp4", tensors), x, weights, ids))


# --- torch.compile ---------------------------------------------------------------------------------------
def test_a_compiled_model_sees_one_operator_and_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = Config()
    dense = Dense.random(moe)
    layer = make_layer(moe, "nvfp4", dense.nvfp4())
    monkeypatch.setattr(execute, "find", {layer.layer_name: layer}.__getitem__)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda *args: call(layer, *args), fullgraph=True, backend=backend, dynamic=True)
    for num_tokens in (3, 9):
        x, weights, ids = inputs(moe, num_tokens)
        assert torch.equal(compiled(x, weights, ids), call(layer, x, weights, ids))
    assert seen == [[torch.ops.moestro.vllm_experts]] * len(seen)
    assert len(seen) <= 2
    torch.library.opcheck(torch.ops.moestro.vllm_experts, (*inputs(moe, 3), layer.layer_name))

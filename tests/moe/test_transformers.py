"""The experts of Transformers' models, with random weights, on their own parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro import ExpertWeights, FusedMoE, fused_moe, route

transformers = pytest.importorskip("transformers")


def qwen3() -> Any:
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        num_experts=8, num_experts_per_tok=3, hidden_size=48, moe_intermediate_size=80, hidden_act="silu"
    )
    return modeling_qwen3_moe.Qwen3MoeExperts(config)


def mixtral() -> Any:
    from transformers.models.mixtral import configuration_mixtral, modeling_mixtral

    config = configuration_mixtral.MixtralConfig(
        num_local_experts=6, num_experts_per_tok=2, hidden_size=80, intermediate_size=112, hidden_act="silu"
    )
    return modeling_mixtral.MixtralExperts(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [qwen3, mixtral])
def test_experts_modules_give_the_same(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = make()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.2)
    experts = experts.to(dtype)
    experts.config._experts_implementation = "eager"
    w = ExpertWeights.from_dense(experts.gate_up_proj, experts.down_proj, format="bf16")
    num_experts, _, hidden = experts.gate_up_proj.shape
    layer = FusedMoE(w, top_k=2)
    for num_tokens in (1, 33):
        x = torch.randn(num_tokens, hidden).to(dtype)
        ids, weights = route(torch.randn(num_tokens, num_experts), 2, method="softmax_renormalize")
        with torch.no_grad():
            expected = experts(x, ids.long(), weights)
        for y in (fused_moe(x, ids, weights, w), layer(x, ids, weights)):
            assert y.dtype == dtype
            error = float((y.float() - expected.float()).norm() / expected.float().norm())
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)

"""Routers: each method against the Transformers module that it stands for, and errors on bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import moestro.errors as errors
from moestro.routing import METHODS, route

pytest.importorskip("transformers")
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
from transformers.models.glm4_moe import configuration_glm4_moe, modeling_glm4_moe
from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
from transformers.models.llama4 import configuration_llama4, modeling_llama4
from transformers.models.mixtral import configuration_mixtral, modeling_mixtral
from transformers.models.olmoe import configuration_olmoe, modeling_olmoe
from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

H, E, K, N = 48, 32, 6, 65


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_random_parameters(module: torch.nn.Module) -> torch.nn.Module:
    for i, parameter in enumerate([*module.parameters(), *module.buffers()]):
        parameter.data = randn(*parameter.shape, seed=i + 1) * 0.3
    return module


def by_expert(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights [N, E], 0 where a token does not go: the routing whatever its order."""
    return torch.zeros(len(ids), E).scatter(1, ids.long(), weights.float())


ROUTERS: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "qwen3_moe": (
        lambda: modeling_qwen3_moe.Qwen3MoeTopKRouter(
            configuration_qwen3_moe.Qwen3MoeConfig(
                hidden_size=H, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
            )
        ),
        "softmax_renormalize",
    ),
    "mixtral": (
        lambda: modeling_mixtral.MixtralTopKRouter(
            configuration_mixtral.MixtralConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)
        ),
        "softmax_renormalize",
    ),
    "olmoe": (
        lambda: modeling_olmoe.OlmoeTopKRouter(
            configuration_olmoe.OlmoeConfig(
                hidden_size=H, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False
            )
        ),
        "softmax",
    ),
    "gpt_oss": (
        lambda: modeling_gpt_oss.GptOssTopKRouter(
            configuration_gpt_oss.GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)
        ),
        "topk_softmax",
    ),
}


@pytest.mark.parametrize("model", ROUTERS)
def test_route_equals_the_router_of_transformers(model: str) -> None:
    make, method = ROUTERS[model]
    logits, expected_weights, expected_ids = with_random_parameters(make())(randn(N, H))
    ids, weights = route(logits.detach(), K, method)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert torch.equal(expected_ids.int(), ids)
    torch.testing.assert_close(weights, expected_weights.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_routed_in_float32_as_transformers_does(dtype: torch.dtype) -> None:
    router = with_random_parameters(ROUTERS["mixtral"][0]()).to(dtype)
    logits, expected_weights, expected_ids = router(randn(N, H).to(dtype))
    ids, weights = route(logits.detach(), K)
    assert torch.equal(expected_ids.int(), ids)
    torch.testing.assert_close(weights, expected_weights.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("groups", "top_groups", "scale"), [(1, 1, 1.0), (8, 4, 2.5), (4, 1, 2.827), (16, 16, 1.0)]
)
def test_route_equals_deepseek_v3_with_groups_and_bias(groups: int, top_groups: int, scale: float) -> None:
    config = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=scale,
        norm_topk_prob=True,
    )
    router = with_random_parameters(modeling_deepseek_v3.DeepseekV3TopkRouter(config))
    logits, expected_weights, expected_ids = router(randn(N, H))
    ids, weights = route(
        logits.detach(),
        K,
        "deepseek_v3",
        bias=router.e_score_correction_bias,
        num_groups=groups,
        top_groups=top_groups,
        scale=scale,
    )
    expected = by_expert(expected_ids, expected_weights.detach())
    torch.testing.assert_close(by_expert(ids, weights), expected, rtol=1e-6, atol=0)


def test_a_group_of_one_expert_is_as_good_as_the_expert() -> None:
    """Transformers ranks a group by its two best experts, and has no answer here."""
    logits, bias = randn(N, E), randn(E, seed=1)
    expected = by_expert(*route(logits, K, "deepseek_v3", bias=bias))
    grouped = route(logits, K, "deepseek_v3", bias=bias, num_groups=E, top_groups=K + 1)
    assert torch.equal(expected, by_expert(*grouped))


def test_route_equals_glm4_moe() -> None:
    config = configuration_glm4_moe.Glm4MoeConfig(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
    )
    router = with_random_parameters(modeling_glm4_moe.Glm4MoeTopkRouter(config))
    logits, expected_weights, expected_ids = router(randn(N, H))
    ids, weights = route(logits.detach(), K, "deepseek_v3", bias=router.e_score_correction_bias, scale=2.5)
    expected = by_expert(expected_ids, expected_weights.detach())
    torch.testing.assert_close(by_expert(ids, weights), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_route_equals_llama4(top_k: int) -> None:
    config = configuration_llama4.Llama4TextConfig(
        hidden_size=H,
        num_local_experts=E,
        num_experts_per_tok=top_k,
        intermediate_size=8,
        num_attention_heads=4,
    )
    scores, logits = with_random_parameters(modeling_llama4.Llama4Router(config))(randn(N, H))
    ids, weights = route(logits.detach(), top_k, "sigmoid")
    torch.testing.assert_close(by_expert(ids, weights), scores.detach(), rtol=1e-6, atol=0)


@given(st.integers(0, 40), st.integers(1, 40), st.data())
@settings(max_examples=40)
def test_experts_are_distinct_in_range_and_renormalised_weights_sum_to_one(
    num_tokens: int, num_experts: int, data: Any
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    logits = randn(num_tokens, num_experts, seed=num_tokens) * data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    for method in METHODS:
        ids, weights = route(logits, top_k, method)
        assert ids.shape == weights.shape == (num_tokens, top_k)
        assert all(len(set(row)) == top_k and set(row) <= set(range(num_experts)) for row in ids.tolist())
        if method in ("softmax_renormalize", "topk_softmax"):
            torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens), rtol=1e-5, atol=0)
        if method == "deepseek_v3":  # its guard against a sum of zero takes from scores near 1e-20
            scores = torch.sigmoid(logits.double()).gather(1, ids.long()).sum(-1)
            expected = scores / (scores + 1e-20)
            torch.testing.assert_close(weights.sum(-1).double(), expected, rtol=1e-5, atol=0)


def test_scale_multiplies_the_weights_of_every_method() -> None:
    logits = randn(5, E)
    for method in METHODS:
        assert torch.equal(route(logits, K, method)[1] * 2.5, route(logits, K, method, scale=2.5)[1])


@pytest.mark.parametrize("method", METHODS)
def test_routing_compiles_whole_and_never_waits_for_the_device(method: str) -> None:
    options = {"num_groups": 4, "top_groups": 2, "bias": randn(E)} if method == "deepseek_v3" else {}
    compiled = torch.compile(route, backend="eager", fullgraph=True, dynamic=True)
    for n in (3, 17):
        for a, b in zip(
            compiled(randn(n, E), K, method, **options), route(randn(n, E), K, method, **options), strict=True
        ):
            assert torch.equal(a, b)
    with FakeTensorMode() as mode:  # has no values: reading one back to the host raises
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        ids, _ = route(torch.empty(9, E), K, method, **fakes)
        assert ids.shape == (9, K)


V3 = {"method": "deepseek_v3"}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"top_k": 9}, errors.RoutingError, "top_k must be from 1 to the number of experts, 8, got 9"),
        ({"top_k": 0}, errors.RoutingError, "got 0"),
        ({"method": "softmaxx"}, errors.RoutingError, "did you mean 'softmax'"),
        ({"logits": torch.zeros(8)}, errors.ShapeError, r"logits must have shape \[N, E\], got \[8\]"),
        ({"logits": torch.zeros(3, 8).int()}, errors.DTypeError, "logits must be bfloat16"),
        ({"logits": torch.zeros(3, 8).double()}, errors.DTypeError, "got torch.float64"),
        ({"logits": [[1.0]]}, errors.DTypeError, "got list"),
        ({"bias": torch.zeros(8)}, errors.RoutingError, "bias must be given only to method 'deepseek_v3'"),
        ({"num_groups": 2, "method": "sigmoid"}, errors.RoutingError, "num_groups must be given only"),
        (V3 | {"bias": torch.zeros(7)}, errors.ShapeError, r"bias must have shape \[8\]"),
        (V3 | {"bias": torch.zeros(8).int()}, errors.DTypeError, "bias must be floating"),
        (V3 | {"bias": torch.zeros(8, device="meta")}, errors.DeviceError, "on cpu"),
        (
            {"method": "deepseek_v3", "num_groups": 3},
            errors.RoutingError,
            "num_groups must divide .* 8, got 3",
        ),
        (
            {"method": "deepseek_v3", "num_groups": 4, "top_groups": 5},
            errors.RoutingError,
            "top_groups must be",
        ),
        (
            {"method": "deepseek_v3", "num_groups": 4, "top_groups": 1, "top_k": 3},
            errors.RoutingError,
            "1 · 2",
        ),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"logits": torch.zeros(3, 8), "top_k": 2} | kwargs
    with pytest.raises(error, match=message):
        route(**call)

"""Tiny models of several families, whole, on experts_implementation="moestro"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro.errors import BackendError

transformers = pytest.importorskip("transformers", minversion="5.7")

from moestro.integrations import transformers as integration  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
pytestmark = pytest.mark.usefixtures("registered")


def qwen3() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, intermediate_size=48
        )
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48)
    )


def gpt_oss() -> Any:
    """Transposed, interleaved, with biases and a clamped gate of its own."""
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48)
    )


def random_model(make: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def logits(model: Any, implementation: str, num_tokens: int = 9) -> torch.Tensor:
    tokens = torch.arange(num_tokens)[None] * 7 % 64
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize("make", [qwen3, mixtral, gpt_oss])
def test_a_model_gives_the_same_logits(make: Any) -> None:
    model = random_model(make)
    torch.testing.assert_close(logits(model, "moestro"), logits(model, "eager"), rtol=1e-4, atol=1e-4)
    layers = [m for m in model.modules() if integration.LAYER in m.__dict__]
    assert len(layers) == 2


def test_a_model_in_bf16() -> None:
    model = random_model(qwen3, torch.bfloat16)
    ours, theirs = logits(model, "moestro"), logits(model, "eager")
    assert ours.dtype == torch.bfloat16
    assert float((ours - theirs).float().norm() / theirs.float().norm()) < 3e-2


def test_the_layers_can_be_made_ahead_and_are_no_part_of_the_state() -> None:
    model = random_model(qwen3)
    keys = set(model.state_dict())
    layers = integration.prepare(model, format="bf16", max_num_tokens=8192)
    assert [layer.top_k for layer in layers] == [2, 2]
    logits(model, "moestro")
    again = integration.prepare(model, format="bf16", max_num_tokens=8192)
    assert all(a is b for a, b in zip(layers, again, strict=True))
    assert set(model.state_dict()) == keys


def test_weights_written_since_are_noticed() -> None:
    model = random_model(qwen3)
    before = logits(model, "moestro")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(2)
    after = logits(model, "moestro")
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, logits(model, "eager"), rtol=1e-4, atol=1e-4)


def test_quantised_experts_are_near() -> None:
    integration.register(format="nvfp4", backend="portable")
    model = random_model(qwen3)
    ours, theirs = logits(model, "moestro"), logits(model, "eager")
    error = float((ours - theirs).norm() / theirs.norm())
    assert 1e-3 < error < 0.3


def test_long_batches_are_cut() -> None:
    integration.register(max_num_tokens=4)
    model = random_model(qwen3)
    torch.testing.assert_close(logits(model, "moestro"), logits(model, "eager"), rtol=1e-4, atol=1e-4)


def test_an_activation_that_we_do_not_have_is_an_error() -> None:
    model = random_model(qwen3)
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.act_fn = torch.nn.Tanh()
    with pytest.raises(BackendError, match="Qwen3MoeExperts has an activation"):
        logits(model, "moestro")


def test_what_transformers_has_forgotten_is_forgotten_here() -> None:
    """Its registry is the one that counts; there is no copy to be kept equal."""
    integration.register("another", format="nvfp4")
    assert set(integration.REGISTERED) == {"moestro", "another"}
    assert integration.REGISTERED["another"].format == "nvfp4"
    del integration.ExpertsInterface._global_mapping["another"]
    assert "another" not in integration.REGISTERED
    integration.ExpertsInterface.register("moestro", lambda *args: None)
    assert list(integration.REGISTERED) == [], "replaced by somebody else's"
    with pytest.raises(TypeError, match=r"register\(\)"):
        integration.REGISTERED["x"] = integration.Settings()

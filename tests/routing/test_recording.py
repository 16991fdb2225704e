"""Routing recorded from models, saved, sampled, and forced again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moestro
from moestro.errors import RoutingError
from moestro.routing import Recorded, Recording, record, replay

E, K, H, LAYERS = 6, 2, 32, 3


class Net(torch.nn.Module):
    """Three FusedMoE after routers of their own."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        dense = [torch.randn(s, generator=g) for s in ((E, 64, H), (E, H, 32))]
        w = moestro.ExpertWeights.from_dense(*dense, "bf16")
        self.routers = torch.nn.ModuleList(torch.nn.Linear(H, E) for _ in range(LAYERS))
        self.layers = torch.nn.ModuleList(moestro.FusedMoE(w, K, backend="portable") for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router, layer in zip(self.routers, self.layers, strict=True):
            ids, weights = moestro.route(router(x), K)
            x = x + layer(x, ids, weights) / 100
        return x


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_a_recording_is_sequence_by_layers_by_k_and_samples_read_it(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(10, H)
    with torch.no_grad(), record(net) as recording:
        net(x[:7])
        net(x[7:])
    assert recording.ids.shape == (10, LAYERS, K)
    assert recording.ids.dtype == torch.int32
    first, _ = moestro.route(net.routers[0](x), K)
    assert torch.equal(recording.ids[:, 0], first)
    path = tmp_path / f"run{suffix}"
    recording.save(path)
    ids = recording.ids
    assert torch.equal(Recorded(path, layer=1).sample(10, E, K), ids[:, 1])
    assert torch.equal(Recorded(path).sample(25, E, K), ids.transpose(0, 1).flatten(0, 1)[:25])
    assert torch.equal(Recording.load(path).ids, ids)
    with pytest.raises(RoutingError, match=r"layer must be in 0\.\.2"):
        Recorded(path, layer=3).sample(1, E, K)


def test_replay_forces_the_recorded_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(10, H)
    with torch.no_grad(), record(net) as recording:
        want = net(x)
    recording.save(tmp_path / "run.safetensors")
    with torch.no_grad():
        for router in net.routers:
            router.weight.normal_()
        assert not torch.allclose(net(x), want)
        for source in (recording, tmp_path / "run.safetensors"):
            with replay(net, source), record(net) as again:
                assert torch.equal(torch.cat([net(x[:4]), net(x[4:])]), want) or torch.allclose(
                    net(x[:0]), x[:0]
                )
            assert torch.equal(again.ids[:10], recording.ids)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(4, H)
    with torch.no_grad(), record(net) as recording:
        net(x)
    with torch.no_grad(), replay(net, recording), pytest.raises(RoutingError, match="the recording has 4"):
        net(torch.randn(5, H))
    recording.save(tmp_path / "ids.npy")
    with pytest.raises(RoutingError, match="ids alone"), replay(net, tmp_path / "ids.npy"):
        pass
    with pytest.raises(RoutingError, match="no experts modules"), record(torch.nn.Linear(2, 2)):
        pass
    with record(net) as empty:
        pass
    with pytest.raises(RoutingError, match="no token"):
        _ = empty.ids


def test_transformers_models_are_recorded_and_replayed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.7")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=32,
    )
    torch.manual_seed(0)
    model: Any = transformers.Qwen3MoeForCausalLM(config).eval()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad(), record(model) as recording:
        want = model(tokens).logits
    assert recording.ids.shape == (12, 2, K)
    assert recording.num_experts == E
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp.gate." in name:
                p.normal_()
        assert not torch.allclose(model(tokens).logits, want, atol=1e-4)
        with replay(model, recording):
            torch.testing.assert_close(model(tokens).logits, want)


def tiny_model(seed: int = 0) -> Any:
    """A Qwen3-MoE of two layers whose routers prefer some experts, as a trained one's do."""
    transformers = pytest.importorskip("transformers", minversion="5.7")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=H, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=E, num_experts_per_tok=K, moe_intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                p.normal_(std=0.3).mul_(torch.linspace(2.0, 0.5, E)[:, None])
            elif ".mlp.experts." in name:
                p.mul_(15)
    return model


def test_what_was_recorded_on_dense_experts_is_replayed_on_packed_ones(tmp_path: Path) -> None:
    """Router replay: the rollout's routing, forced on the trainer's model (or the other way round)."""
    model = tiny_model()
    from moestro.integrations import transformers as mt

    tokens = torch.arange(40).view(4, 10) % 64
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    recording.save(tmp_path / "rollout.safetensors")
    mt.quantize_experts(model, "nvfp4", backend="portable")
    with torch.no_grad():
        with record(model) as own:
            free = model(tokens).logits
        assert not torch.equal(own.ids, recording.ids), "four bits route some token elsewhere"
        with replay(model, tmp_path / "rollout.safetensors"), record(model) as forced:
            held = model(tokens).logits
    assert torch.equal(forced.ids, recording.ids)
    torch.testing.assert_close(forced.weights, recording.weights)
    assert not torch.equal(held, free)


def test_tokens_are_in_the_order_of_the_calls_in_generation_too() -> None:
    model = tiny_model()
    tokens = torch.arange(1, 8).view(1, 7)  # without the token that stands for padding
    with torch.no_grad(), record(model) as recording:
        made = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert recording.ids.shape == (7 + 3, 2, K), (
        "the prompt, then a token a step; the last one is never put in"
    )
    with torch.no_grad(), record(model) as whole:
        model(made[:, :-1], use_cache=False)
    assert torch.equal(whole.ids, recording.ids)


def test_a_recording_of_another_model_is_refused_with_both_numbers() -> None:
    model = tiny_model()
    with torch.no_grad(), record(model) as recording:
        model(torch.arange(4).view(1, 4))
    three, two = Net(), recording
    with pytest.raises(RoutingError, match="the model's 3 layers, got 2"), replay(three, two):
        pass
    made = Recording([str(i) for i in range(LAYERS)], E)
    made._ids = {name: [torch.zeros(4, K + 1, dtype=torch.int32)] for name in made.layers}
    made._weights = {name: [torch.zeros(4, K + 1)] for name in made.layers}
    with (
        torch.no_grad(),
        replay(three, made),
        pytest.raises(RoutingError, match=f"top_k {K}, the recording has 4 with top_k {K + 1}"),
    ):
        three(torch.randn(4, H))

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

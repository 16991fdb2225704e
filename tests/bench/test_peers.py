"""Transformers' experts compute our layer on our weights, in every implementation we compare with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_plain import plain_moe, relative_error

from moestro.bench.contenders import make_layer
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.models import MoeShape, from_sizes
from moestro.bench.peers import IMPLEMENTATIONS, transformers_missing, transformers_peers
from moestro.routing import Uniform
from moestro.tuning import AutoTuner

pytestmark = pytest.mark.skipif(transformers_missing() is not None, reason=str(transformers_missing()))

SHAPES = {
    "silu": from_sizes("8,2,64,32"),
    "gelu_tanh": from_sizes("8,2,64,32", "gelu_tanh"),
    "no gate": from_sizes("8,2,64,32", "relu2"),
    "gpt-oss": replace(from_sizes("8,2,64,32", "swiglu_oai"), biases=True),
    "slice": from_sizes("8,2,64,32").on_ranks(2),
    "local slice": from_sizes("8,2,64,32").on_ranks(2, local_pairs=True),
    "slice of no gate": from_sizes("8,2,64,32", "relu2").on_ranks(4),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 17])
def test_peers_compute_the_layer(name: str, implementation: str, tokens: int) -> None:
    source = LayerSource(SHAPES[name], seed=3)
    case = make_case(source.shape, tokens, Uniform(), seed=5)
    (peer,) = transformers_peers([source], [implementation])
    if name == "slice of no gate" and implementation == "eager":
        assert "pairs of other ranks" in str(peer.why_not(case))
        return
    assert peer.why_not(case) is None
    with torch.inference_mode():
        got = peer.calls(case)[0]()
    assert got.shape == (tokens, 64)
    expected = plain_moe(source, case)
    if expected.norm() == 0:  # one token, all of its experts on other ranks
        assert got.norm() == 0
    else:
        assert relative_error(got, expected) < 1e-2


def test_peers_share_our_tensors(tiny: MoeShape) -> None:
    source = LayerSource(tiny)
    peer = transformers_peers([source])[0]
    (module,) = peer._modules  # type: ignore[attr-defined]
    assert module.gate_up_proj.data_ptr() == source.dense[0].data_ptr()
    assert module.down_proj.data_ptr() == source.dense[1].data_ptr()
    assert peer.nbytes == 2 * tiny.num_weights


def test_batched_mm_is_skipped_where_its_copies_pass_the_limit(tiny: MoeShape) -> None:
    source = LayerSource(tiny)
    (peer,) = transformers_peers([source], ["batched_mm"], memory=4 * tiny.weights_per_expert * 2)
    assert peer.why_not(make_case(tiny, 2, Uniform())) is None  # 2 tokens × 2 experts: exactly the limit
    assert "--peer-memory" in str(peer.why_not(make_case(tiny, 3, Uniform())))


def test_one_call_per_layer(tiny: MoeShape) -> None:
    sources = [LayerSource(tiny, layer=index) for index in range(3)]
    (peer,) = transformers_peers(sources, ["eager"])
    case = make_case(tiny, 4, Uniform())
    outputs = [call() for call in peer.calls(case)]
    for source, output in zip(sources, outputs, strict=True):
        assert relative_error(output, plain_moe(source, case)) < 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_peers_and_moestro_agree_on_the_same_weights(name: str) -> None:
    source = LayerSource(SHAPES[name], seed=4)
    case = make_case(source.shape, 33, Uniform(), seed=6)
    layer = make_layer(source, "bf16", "auto", 64, AutoTuner())
    with torch.inference_mode():
        ours = layer(case.x, case.ids, case.weights)
        for peer in transformers_peers([source]):
            if peer.why_not(case) is None:
                assert relative_error(peer.calls(case)[0](), ours) < 1e-2, peer.name

"""fused_moe and FusedMoE under torch.compile(fullgraph=True)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import E, H, K, error, make_call, make_weights

from moestro import FusedMoE, SwiGLU, errors, fused_moe
from moestro.formats import NVFP4
from moestro.moe import torch_op as op

COMPILE: dict[str, Any] = {
    "fullgraph": True,
    "backend": "aot_eager",
}  # Inductor once, below: it takes seconds


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_the_function_is_one_graph_node(fmt: str) -> None:
    w, call = make_weights(fmt), make_call(9)
    compiled = torch.compile(lambda x, ids, weights: fused_moe(x * 2, ids, weights, w) + 1, **COMPILE)
    x, ids, weights = call
    assert torch.equal(compiled(*call), fused_moe(x * 2, ids, weights, w) + 1)


def test_every_keyword_goes_through() -> None:
    w = make_weights("nvfp4", experts=4)
    options: dict[str, Any] = {
        "activation": SwiGLU(alpha=1.702, limit=0.5, up_shift=1.0),
        "input_format": "nvfp4",
        "expert_offset": 2,
        "deterministic": True,
        "backend": "portable",
        "tactic": ("masked", 2),
        "num_experts": E,
    }
    compiled = torch.compile(lambda *call: fused_moe(*call, w, **options), **COMPILE)
    call = make_call(9)
    assert torch.equal(compiled(*call), fused_moe(*call, w, **options))


def test_out_is_written_in_place() -> None:
    w, call = make_weights(), make_call(9)

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        fused_moe(x, ids, weights, w, out=out)
        return out * 2

    out = torch.full((9, H), torch.nan, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(run, **COMPILE)(*call, out), fused_moe(*call, w) * 2)
    assert torch.equal(out, fused_moe(*call, w))


def test_quantised_activations() -> None:
    w, (x, ids, weights) = make_weights(), make_call(9)
    q = NVFP4.quantize_rows(x)
    compiled = torch.compile(
        lambda packed, scale, glob: fused_moe(NVFP4(packed, scale, glob), ids, weights, w), **COMPILE
    )
    assert torch.equal(compiled(q.packed, q.scale, q.global_scale), fused_moe(q, ids, weights, w))


def test_the_layer_runs_itself_inside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call = FusedMoE(make_weights(), K), make_call(9)
    runs = []
    run = FusedMoE.run
    monkeypatch.setattr(FusedMoE, "run", lambda self, *a, **k: runs.append(self) or run(self, *a, **k))
    assert torch.equal(torch.compile(layer, **COMPILE)(*call), run(layer, *call))
    assert runs == [layer]


def test_inductor_and_a_number_of_tokens_that_changes() -> None:
    w = make_weights()
    layer = FusedMoE(w, K)
    compiled = torch.compile(
        lambda x, ids, weights: layer(x + 1, ids, weights) * 2, fullgraph=True, dynamic=True
    )
    for num_tokens in (9, 4, 30):
        x, ids, weights = make_call(num_tokens)
        y = compiled(x, ids, weights)
        assert error(y / 2, x + 1, ids, weights, w) < 1e-2


def test_layers_of_one_model_share_a_graph() -> None:
    """Else compiling a model block by block would hit the limit of recompilations."""
    layers = [FusedMoE(make_weights(seed=seed), K) for seed in range(12)]
    blocks = [Block(layer) for layer in layers]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    call = make_call(9)
    for block, layer in zip(blocks, layers, strict=True):
        assert torch.equal(block(*call), layer(*call) * 2)
    assert counter.frame_count == 1


class Block(torch.nn.Module):
    """A model's block around a layer."""

    def __init__(self, layer: FusedMoE) -> None:
        super().__init__()
        self.moe = layer

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.moe(x, ids, weights)
        return y * 2


def test_an_operator_works_on_weights_whose_owner_is_gone() -> None:
    """As in an exported program: the tensors and the strings are all there is."""
    w, (x, ids, weights) = make_weights(), make_call(9)
    layer = FusedMoE(w, K, deterministic=True)
    expected = layer(x, ids, weights)
    clones = [t.clone() for t in layer.weights.tensors]
    y = torch.ops.moestro.fused_moe(x, [], ids, weights, clones, layer.weights.spec, layer._text)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_operators_pass_torchs_own_checks(quantised: bool) -> None:
    w, (x, ids, weights) = make_weights("bf16"), make_call(5)
    options = op.options_text(
        ("silu", "nvfp4" if quantised else None, 0, False, False, "portable", "loop", None)
    )
    args = tuple(op.FlatCall.of(NVFP4.quantize_rows(x) if quantised else x, ids, weights, w, options))
    # torch's schema check multiplies the inputs, which float8 scales do not allow
    tests = ("test_faketensor",) if quantised else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moestro.fused_moe, args, test_utils=tests)
    torch.library.opcheck(torch.ops.moestro.fused_moe_out, (*args, torch.empty_like(x)), test_utils=tests)


def test_checks_hold_in_the_graph_too() -> None:
    w, (x, ids, weights) = make_weights(), make_call(9)
    compiled = torch.compile(lambda t: fused_moe(x, ids, t, w), **COMPILE)
    with pytest.raises(errors.DTypeError, match=r"weights must be torch\.float32"):
        compiled(weights.double())

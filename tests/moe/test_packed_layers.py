"""Public layers of every kind that the Triton backend says it takes, made as on a chip that is not here."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", minversion="3.8")

from chips import CHIPS, pretend, taken

from moestro import ExpertWeights, FusedMoE, fused_moe, reference
from moestro.errors import BackendError, FormatError, ShapeError
from moestro.formats.base import CHECKPOINT
from moestro.kernels.triton import TritonRunner
from moestro.moe.call import BoundCall, cache_of
from moestro.moe.options import Options
from moestro.moe.tuning_config import OP

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a chip of another capability is here")
E, K, H, I = 2, 2, 96, 128  # noqa: E741


class Kind(NamedTuple):
    chip: str
    format: str
    input_format: str | None
    dtype: torch.dtype


KINDS = [Kind(name, *kind) for name in CHIPS for kind in taken(name, H, I)]
OF_BF16 = [kind for kind in KINDS if kind.dtype == torch.bfloat16]
# what is packed and run otherwise on one chip than on the others
DISTINCT = [k for k in OF_BF16 if k.chip == "hopper" or (k.format != "bf16" and k.input_format is not None)]
W4A16 = {fmt: f"triton-{name}r64c64" for fmt, name in
         {"nvfp4": "", "mxfp4": "mxfp4-", "mxfp8": "mxfp8-", "fp8_block": "fp8-", "int4": "int4-"}.items()}  # fmt: skip
LAYOUTS = {  # (chip, weights, activations) -> layout; other kinds may come
    **{(name, fmt, None): layout for name in CHIPS for fmt, layout in W4A16.items()},
    **{(name, "bf16", x): CHECKPOINT for name in CHIPS for x in (None, "nvfp4")},
    **{("hopper", fmt, "nvfp4"): layout for fmt, layout in W4A16.items()},
    ("hopper", "nvfp4", "fp8"): "triton-fp8-nvfp4-r64c128",
    ("hopper", "mxfp4", "fp8"): "triton-fp8-mxfp4-r64c128g32",
    ("hopper", "fp8_block", "fp8"): "triton-e4m3-rows",
    ("sm_100", "nvfp4", "nvfp4"): CHECKPOINT,
    ("sm_100", "mxfp4", "fp8"): CHECKPOINT,
    ("sm_100", "mxfp8", "fp8"): CHECKPOINT,
}


def name(kind: Kind) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in kind)


def dense(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(E, 2 * I, H, generator=gen), torch.randn(E, H, I, generator=gen)
    return (gate_up * 0.1).to(dtype), (down * 0.1).to(dtype)


def biases() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return {
        "gate_up_bias": torch.randn(E, 2 * I, generator=gen),
        "down_bias": torch.randn(E, H, generator=gen),
    }


@functools.cache
def kept(format: str, dtype: torch.dtype) -> ExpertWeights:
    return ExpertWeights.from_dense(*dense(dtype), format, **biases())


def checkpoint(kind: Kind) -> ExpertWeights:
    """The same for all tests, which do not write to them."""
    return kept(kind.format, kind.dtype)


@functools.cache
def layer_on(kind: Kind) -> FusedMoE:
    """The layer of a kind, made once, on its chip."""
    return layer_of(checkpoint(kind), kind)


def layer_of(w: ExpertWeights, kind: Kind, **more: Any) -> FusedMoE:
    options = {"input_format": kind.input_format, "dtype": kind.dtype, "backend": "triton", **more}
    return FusedMoE(w, K, 16, num_experts=2 * E, **options)


def call(num_tokens: int, dtype: torch.dtype, hidden: int = H) -> tuple[torch.Tensor, ...]:
    """Nobody comes to local expert 1; ids of other ranks' experts, and one that there is not."""
    gen = torch.Generator().manual_seed(2)
    ids = torch.rand(num_tokens, 2 * E, generator=gen).argsort(-1)[:, :K].int()
    ids = torch.where(ids == 1, -7, ids).contiguous()
    ids[:1, 0] = 0
    return (
        torch.randn(num_tokens, hidden, generator=gen).to(dtype),
        ids,
        torch.rand(num_tokens, K, generator=gen),
    )


def plan(layer: FusedMoE, num_tokens: int) -> list[Any]:
    x, ids, weights = call(num_tokens, layer.dtype)
    return layer.runners[0].plan([x, ids, weights, torch.empty_like(x)])


def same(a: ExpertWeights, b: ExpertWeights) -> bool:
    return a.spec == b.spec and all(
        x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a.tensors, b.tensors, strict=True)
    )


@pytest.fixture
def on_chip(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, kind.chip)


def test_every_kind_that_was_taken_still_is_in_its_layout() -> None:
    assert set(LAYOUTS) <= {kind[:3] for kind in KINDS}
    with_half = {kind[:3] for kind in KINDS if kind.dtype == torch.float16}
    assert {at for at in LAYOUTS if at[1:] != ("bf16", "nvfp4")} <= with_half


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_a_layer_holds_the_checkpoints_experts_and_can_be_planned(kind: Kind) -> None:
    w = checkpoint(kind)
    layer = layer_on(kind)
    held = layer.weights
    assert held.layout == LAYOUTS.get(kind[:3], held.layout)
    sizes = (held.num_experts, held.hidden_size, held.intermediate_size, held.format, held.gated, held.biased)
    assert sizes == (E, H, I, kind.format, True, True)
    assert held.nbytes == sum(t.nbytes for t in held.tensors) > w.nbytes // 2
    assert repr(held) in repr(layer)
    assert f"layout={held.layout!r}" in repr(held)
    assert same(held.unpacked(), w)
    assert held.unpacked().layout == CHECKPOINT
    assert [type(runner) for runner in layer.runners] == [TritonRunner]
    for num_tokens in (1, 9):
        launches = [launch.kernel.__name__ for launch in plan(layer, num_tokens)]
        assert launches[-1] == "sum_pairs"
        assert layer.decision(num_tokens) is None
    assert plan(layer, 0) == []


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_values_are_the_checkpoints_or_rounded_to_what_fp8_products_take(kind: Kind) -> None:
    w = checkpoint(kind)
    held = layer_on(kind).weights
    for mine, theirs in ((held.gate_up, w.gate_up), (held.down, w.down)):
        values = mine.dequantize()
        assert values.shape == mine.shape == theirs.shape
        folded = held.layout.startswith(("triton-fp8-nvfp4", "triton-fp8-mxfp4"))
        for e in range(E):
            one = theirs.expert(e)
            exact = reference.fold_e4m3(one) if folded else one.dequantize()
            assert bool(((values[e] - exact).abs() <= folded * 1e-6 * exact.abs()).all())
            assert torch.equal(mine.expert(e).dequantize(), values[e])
            assert mine.expert(e).shape == theirs.expert(e).shape
        buffer = torch.full(values.shape, torch.nan, dtype=torch.bfloat16)
        assert mine.dequantize(torch.bfloat16, out=buffer) is buffer
        assert torch.equal(buffer, values.bfloat16())


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_copies_and_pickles_have_the_same_packed_weights_and_run_the_same_kernels(kind: Kind) -> None:
    layer = layer_on(kind)
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(layer), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)[0]
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved]
    for twin in twins:
        assert same(twin.weights, layer.weights)
        assert not {t.data_ptr() for t in twin.weights.tensors if t.numel()} & {
            t.data_ptr() for t in layer.weights.tensors
        }
        assert [a.key for a in plan(twin, 9)] == [a.key for a in plan(layer, 9)]
    for part in (layer.weights.gate_up, layer.weights.down):
        for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert type(again) is type(part)
            assert torch.equal(again.dequantize(), part.dequantize())


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_weights_move_are_shared_and_are_no_part_of_a_state_dict(kind: Kind) -> None:
    layer = copy.deepcopy(layer_on(kind))
    held = layer.weights
    assert held.to("cpu") is held
    elsewhere = held.to("meta")
    assert (elsewhere.layout, elsewhere.nbytes, elsewhere.device.type) == (held.layout, held.nbytes, "meta")
    assert elsewhere.gate_up.shape == held.gate_up.shape
    for tensor in held.tensors:
        tensor.share_memory_()
    assert same(held, pickle.loads(pickle.dumps(held)))
    assert layer.state_dict() == {}
    assert str(layer.load_state_dict({})) == "<All keys matched successfully>"
    assert str(layer.half().weights.tensors[0].dtype) == str(held.tensors[0].dtype)


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_however_a_layer_is_made_its_weights_are_packed_once_and_alike(kind: Kind) -> None:
    w, layer = checkpoint(kind), layer_on(kind)
    again = layer_of(layer.weights, kind)
    assert again.weights is layer.weights
    assert layer.weights.prepare("triton", input_format=kind.input_format) is layer.weights
    assert same(layer_of(copy.deepcopy(w), kind, donate=True).weights, layer.weights)
    straight = ExpertWeights.from_dense(*dense(), kind.format, backend="triton",
                                        input_format=kind.input_format, **biases())  # fmt: skip
    experts = [(w.gate_up.expert(e), w.down.expert(e)) for e in range(E)]
    one_by_one = ExpertWeights.from_experts(experts, "triton", input_format=kind.input_format, **biases())
    for made in (straight, one_by_one):
        assert same(made, layer.weights)
        assert layer_of(made, kind).weights is made


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_a_write_to_the_checkpoint_is_packed_again(kind: Kind) -> None:
    w = copy.deepcopy(checkpoint(kind))
    layer = layer_of(w, kind)
    piece = w.down.pieces[0]
    piece.view(torch.uint8).copy_(piece.view(torch.uint8).flip(0))
    layer._follow()
    assert same(layer.weights.unpacked(), w)


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_packed_weights_for_other_activations_are_refused_by_both_layouts_names(kind: Kind) -> None:
    held = layer_on(kind).weights
    others = [o for o in OF_BF16 if o[:2] == kind[:2] and o.input_format != kind.input_format]
    for other in others:
        wanted = layer_on(other).weights.layout
        if held.layout in (CHECKPOINT, wanted):
            assert layer_of(held, other).weights.layout == wanted
            continue
        for make in (layer_of, lambda w, o: w.prepare("triton", input_format=o.input_format)):
            with pytest.raises(BackendError) as refused:
                make(held, other)
            assert f"layout {wanted!r} here, they were prepared as {held.layout!r}" in str(refused.value)


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", [k for k in DISTINCT if k.input_format is not None], ids=name)
def test_one_checkpoint_serves_calls_of_several_input_formats(kind: Kind) -> None:
    """As fused_moe binds them: each in its layout, one copy a layout."""
    w = checkpoint(kind)
    bound = [
        BoundCall(w, Options(backend="triton", input_format=x), top_k=K, dtype=kind.dtype, cache=cache_of(w))
        for x in (None, kind.input_format, None, kind.input_format)
    ]
    held = [each.runners[0]._experts.gate_up for each in bound]
    assert held[0] is held[2]
    assert held[1] is held[3]
    assert held[0].layout == layer_on(kind._replace(input_format=None)).weights.layout
    assert held[1].layout == layer_on(kind).weights.layout


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_the_portable_backend_stands_in_on_every_layout(kind: Kind) -> None:
    """With the backward pass, which is its own for every backend."""
    held = layer_on(kind).weights
    x, ids, weights = call(9, kind.dtype)
    truth = reference.fused_moe(x, ids, weights, held, input_format=kind.input_format)
    x.requires_grad_()
    y = fused_moe(
        x, ids, weights, held, input_format=kind.input_format, num_experts=2 * E, backend="portable"
    )
    assert float((y.detach().float() - truth).norm() / truth.norm()) < 1e-2
    y.float().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all() and x.grad.abs().sum() > 0)


@pytest.mark.usefixtures("on_chip")
@pytest.mark.parametrize("kind", DISTINCT, ids=name)
def test_an_untuned_layer_says_so_and_has_its_default_among_the_candidates(kind: Kind) -> None:
    layer = layer_on(kind)
    for num_tokens in (1, 9):
        x, ids, weights = call(num_tokens, kind.dtype)
        inputs = [x, ids, weights, torch.empty_like(x)]
        text = layer.tuner.explain(OP, layer.runners, layer.tuning_config, inputs)
        assert "nothing is known; the default serves" in text
        runner: Any = layer.runners[0]
        candidates = runner.get_valid_tactics(inputs, None)
        assert candidates
        for tactic in (runner.default_tactic(inputs), *candidates):
            assert runner.validate_tactic(inputs, tactic)
            assert runner.workspace_bytes(num_tokens, tactic) > 0
            assert runner.plan(inputs, tactic)


def test_what_prepare_cannot_mean_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "hopper")
    w = checkpoint(OF_BF16[0])
    with pytest.raises(ShapeError, match="without a gate"):
        w.prepare("triton", activation="relu2")
    with pytest.raises(FormatError, match="'fp7'; did you mean 'fp8'"):
        w.prepare("portable", input_format="fp7")
    with pytest.raises(BackendError, match="input_format='fp8'"):
        ExpertWeights.from_dense(*dense(), "nvfp4", input_format="fp8")

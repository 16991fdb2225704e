"""A layer whose weights are written in place after it was made gives what a new layer would give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from moe_cases import E, H, I, K, error, make_call, make_weights

import moestro
from moestro import ExpertWeights, FusedMoE
from moestro.errors import MoestroError
from moestro.kernels.cpu import core

BACKENDS = ["portable", *(["cpu"] if core.why_no_core() is None else [])]


def dense() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return (torch.randn(E, 2 * I, H, generator=g) * 0.2).bfloat16(), (
        torch.randn(E, H, I, generator=g) * 0.2
    ).bfloat16()


def zero_an_expert(p: torch.Tensor) -> None:
    p[2].zero_()


def optimiser(p: torch.Tensor) -> None:
    leaf = p.detach().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    torch.optim.SGD([leaf], lr=0.3).step()


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "mul_": lambda p: p.mul_(-2),
    "copy_": lambda p: p.copy_(p.flip(0)),
    "one expert": zero_an_expert,
    "an optimiser's step": optimiser,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("how", WRITES)
def test_a_write_to_the_callers_own_tensors_is_followed(backend: str, part: int, how: str) -> None:
    tensors, call = dense(), make_call(32)  # every expert is hit
    layer = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K, backend=backend)
    before = layer(*call)
    WRITES[how](tensors[part])
    after = layer(*call)
    assert not torch.equal(before, after)
    assert error(after, *call, ExpertWeights.from_dense(*tensors, "bf16")) < 1e-2
    fresh = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K, backend=backend)
    assert torch.equal(after, fresh(*call))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_to_quantised_pieces_is_followed(backend: str) -> None:
    w, call = make_weights("nvfp4"), make_call(4)
    layer = FusedMoE(w, K, backend=backend)
    before = layer(*call)
    w.down.global_scale.mul_(2)
    torch.testing.assert_close(layer(*call).float(), 2 * before.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_that_torch_does_not_count_need_a_refresh(backend: str) -> None:
    tensors, call = dense(), make_call(4)
    layer = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K, backend=backend)
    layer(*call)
    tensors[1].data.mul_(3)
    layer.refresh()
    assert error(layer(*call), *call, ExpertWeights.from_dense(*tensors, "bf16")) < 1e-2


def test_packed_memory_stays_where_it_is_so_that_graphs_stay_valid() -> None:
    tensors, call = dense(), make_call(4)
    layer = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K)
    layer(*call)
    places = [t.data_ptr() for t in layer.weights.tensors]
    tensors[0].mul_(2)
    layer(*call)
    assert [t.data_ptr() for t in layer.weights.tensors] == places


def test_a_compiled_layer_follows_too() -> None:
    tensors, call = dense(), make_call(4)
    layer = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(*call)
    tensors[1].mul_(-1)
    assert error(compiled(*call), *call, ExpertWeights.from_dense(*tensors, "bf16")) < 1e-2


@pytest.mark.skipif("cpu" not in BACKENDS, reason="a backend that packs is needed")
def test_a_layer_keeps_nothing_alive_and_says_what_is_gone() -> None:
    tensors, call = dense(), make_call(4)
    layer = FusedMoE(ExpertWeights.from_dense(*tensors, "bf16"), K, backend="cpu")
    before = layer(*call)
    del tensors
    assert torch.equal(layer(*call), before)
    with pytest.raises(MoestroError, match="2 of 2 are gone"):
        layer.refresh()
    with pytest.raises(MoestroError, match="it is a copy"):
        copy.deepcopy(layer).refresh()
    donated = FusedMoE(make_weights("nvfp4"), K, backend="cpu", donate=True)
    with pytest.raises(MoestroError, match="donated"):
        donated.refresh()


def test_a_layer_without_a_copy_has_nothing_to_refresh() -> None:
    moestro.FusedMoE(make_weights("nvfp4"), K, backend="portable").refresh()

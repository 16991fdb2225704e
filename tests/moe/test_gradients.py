"""Gradients of x and of the routing weights through frozen experts; a refusal for the experts' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_cases import E, H, I, K, make_call, make_weights

from moestro import ExpertWeights, FusedMoE, SwiGLU, errors, fused_moe, reference
from moestro.formats import NVFP4


def truth(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w: Any, **options: Any) -> Any:
    """(y, dx, dweights) by autograd through the reference, in float64."""
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    y = reference.fused_moe(x, ids, weights, w, dtype=torch.float64, **options)
    return (y, *torch.autograd.grad(y.sum() + (y * y).sum(), (x, weights)))


def ours(call: Any, x: torch.Tensor, weights: torch.Tensor) -> Any:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = call(x, weights)
    (y.double().sum() + (y.double() * y.double()).sum()).backward()
    return y, x.grad, weights.grad


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "fp8_block"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2", SwiGLU(1.702, 0.5, 1.0)], ids=str)
def test_gradients_are_those_of_the_reference(fmt: str, activation: Any, backend: str) -> None:
    gated = activation != "relu2"
    bias = {
        "gate_up_bias": torch.full((E - 2, 2 * I if gated else I), 0.1),
        "down_bias": torch.full((E - 2, H), 0.2),
    }
    w = make_weights(fmt, experts=E - 2, gated=gated, dtype=torch.float32, **bias)
    x, ids, weights = make_call(17, dtype=torch.float32)
    options: dict[str, Any] = {"activation": activation, "expert_offset": 1}
    layer = FusedMoE(w, K, 32, num_experts=E, backend=backend, dtype=torch.float32, **options)
    expected = truth(x, ids, weights, w, **options)
    for call in (
        lambda x, t: fused_moe(x, ids, t, w, num_experts=E, backend=backend, **options),
        lambda x, t: layer(x, ids, t),
    ):
        assert all(close(a, b, 1e-4) for a, b in zip(ours(call, x, weights), expected, strict=True))


def test_gradients_in_bf16_and_of_one_of_the_two_alone() -> None:
    w, (x, ids, weights) = make_weights("nvfp4"), make_call(33)
    _, dx, dweights = truth(x, ids, weights, w)
    y = fused_moe(x.requires_grad_(), ids, weights, w)
    (y.double().sum() + (y.double() * y.double()).sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert close(x.grad, dx, 2e-2)
    y = fused_moe(x.detach(), ids, weights.requires_grad_(), w)
    (y.double().sum() + (y.double() * y.double()).sum()).backward()
    assert weights.grad is not None
    assert close(weights.grad, dweights, 2e-2)


def test_quantised_activations_count_as_what_they_stand_for() -> None:
    w, (x, ids, weights) = make_weights("nvfp4", dtype=torch.float32), make_call(9, dtype=torch.float32)
    _, dx, _ = ours(lambda x, t: fused_moe(x, ids, t, w, input_format="int8"), x, weights)
    _, near, _ = ours(lambda x, t: fused_moe(x, ids, t, w), x, weights)
    assert close(dx, near, 0.05)
    q, t = NVFP4.quantize_rows(x), weights.clone().requires_grad_()
    fused_moe(q, ids, t, w).sum().backward()
    assert t.grad is not None
    assert t.grad.abs().sum() > 0


def test_gradients_under_torch_compile() -> None:
    w, (x, ids, weights) = make_weights("nvfp4", dtype=torch.float32), make_call(9, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: fused_moe(x, ids, t, w), fullgraph=True, backend="aot_eager")
    expected = ours(lambda x, t: fused_moe(x, ids, t, w), x, weights)
    for a, b in zip(ours(compiled, x, weights), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    w, (x, ids, weights) = make_weights(), make_call(3)
    assert not fused_moe(x, ids, weights, w).requires_grad
    with torch.no_grad():
        assert not fused_moe(x.requires_grad_(), ids, weights, w).requires_grad


def test_there_is_no_second_derivative() -> None:
    w, (x, ids, weights) = make_weights("bf16", dtype=torch.float32), make_call(3, dtype=torch.float32)
    y = fused_moe(x.requires_grad_(), ids, weights, w)
    with pytest.raises(errors.BackendError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("which", ["gate_up", "down", "gate_up_bias"])
def test_the_experts_own_parameters_are_refused_where_x_wants_no_gradient_too(
    fmt: str, layer: bool, which: str
) -> None:
    """A frozen trunk: before, the head trained, and the experts never moved, without a word."""
    gate_up, down = make_weights("bf16").dequantize()
    parts = {"gate_up": gate_up, "down": down, "gate_up_bias": torch.zeros(E, 2 * I)}
    parts[which] = torch.nn.Parameter(parts[which])
    w = ExpertWeights.from_dense(**parts, format=fmt)
    x, ids, weights = make_call(5, dtype=torch.float32)
    made = FusedMoE(w, K, 8) if layer else None
    head = torch.nn.Linear(H, 1)

    def call(x: torch.Tensor) -> torch.Tensor:
        return made(x, ids, weights) if made is not None else fused_moe(x, ids, weights, w)

    for wants in (False, True):
        loss = head(call(x.clone().requires_grad_(wants))).sum()
        with pytest.raises(errors.BackendError, match=f"{which} of the experts want a gradient.*freeze"):
            loss.backward()
    with torch.no_grad():
        call(x)
    parts[which].requires_grad_(False)
    head(call(x)).sum().backward()  # frozen since: the head trains


def test_a_gradient_and_out_do_not_go_together() -> None:
    w, (x, ids, weights) = make_weights(), make_call(3)
    with pytest.raises(errors.BackendError, match="out must be None"):
        fused_moe(x.requires_grad_(), ids, weights, w, out=torch.empty(3, H, dtype=torch.bfloat16))


def test_copies_train_what_is_around_them() -> None:
    gate_up, down = make_weights("bf16").dequantize()
    layer = FusedMoE(ExpertWeights.from_dense(torch.nn.Parameter(gate_up), down, "bf16"), K, 8)
    x, ids, weights = make_call(5, dtype=torch.float32)
    twin = copy.deepcopy(layer)  # of weights that are nobody's parameters
    twin(x.requires_grad_(), ids, weights).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_experts_computed_from_a_parameter_refuse_its_gradient_too(fmt: str) -> None:
    parameter = torch.nn.Parameter(
        torch.randn(2, H, 2 * I, dtype=torch.bfloat16)
    )  # as gpt-oss keeps it: transposed
    w = ExpertWeights.from_dense(parameter.mT.contiguous(), torch.randn(2, H, I).bfloat16(), fmt)
    x, ids, weights = make_call(3, experts=2, top_k=1)
    y = fused_moe(x, ids, weights, w)
    assert y.requires_grad
    with pytest.raises(errors.BackendError, match="gate_up of the experts want a gradient"):
        y.sum().backward()
    parameter.requires_grad_(False)
    assert not fused_moe(x, ids, weights, w).requires_grad


def test_an_out_that_wants_a_gradient_is_refused() -> None:
    x, ids, weights = make_call(3)
    w = make_weights()
    out = torch.empty_like(x, requires_grad=True)
    with pytest.raises(errors.BackendError, match="out must not want a gradient"):
        fused_moe(x, ids, weights, w, out=out)
    with torch.no_grad():
        fused_moe(x, ids, weights, w, out=out)


@pytest.mark.parametrize("which", ["x", "weights"])
@pytest.mark.parametrize("layer", [False, True])
def test_a_tangent_of_forward_mode_is_refused_and_not_dropped(which: str, layer: bool) -> None:
    import torch.autograd.forward_ad as forward

    w, (x, ids, weights) = make_weights(), make_call(3, dtype=torch.float32)
    call = FusedMoE(w, K, 8) if layer else lambda *given: fused_moe(*given, w)
    with forward.dual_level():
        given = {"x": x, "weights": weights}
        given[which] = forward.make_dual(given[which], torch.ones_like(given[which]))
        with pytest.raises(errors.BackendError, match=f"{which} must have no tangent"):
            call(given["x"], ids, given["weights"])
        assert torch.isfinite(call(x, ids, weights)).all(), "a call without one is not concerned"

"""Values that would be taken in silence: scales that no calibration makes, and counts of other types."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from moe_cases import E, K, error, make_call, make_weights

import moestro
from moestro import ExpertWeights, FusedMoE, errors, fused_moe
from moestro.routing import Uniform

BAD = [0.0, math.nan, math.inf, -1e-3]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["gate_up_input_scale", "down_input_scale"])
@pytest.mark.parametrize("each", [False, True])
def test_an_input_scale_that_is_none_is_refused(name: str, value: float, each: bool) -> None:
    scale = torch.full((E,) if each else (), 0.01)
    scale[(2,) if each else ()] = value
    with pytest.raises(errors.FormatError, match=f"{name} must be finite and positive.*{'expert 2' * each}"):
        make_weights("nvfp4", **{name: scale})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_a_weights_scale_that_is_none_is_refused(which: str, value: float) -> None:
    for fmt, piece in (("nvfp4", "global_scale"), ("fp8_block", "scale_inv")):
        w = make_weights(fmt)
        if value == 0 and fmt == "fp8_block":
            continue  # what a block of zeros may have
        tensor: Any = getattr(w, which)
        scale = getattr(tensor, piece).clone()
        scale[3] = value
        parts = {"gate_up": w.gate_up, "down": w.down, which: dataclasses.replace(tensor, **{piece: scale})}
        with pytest.raises(errors.FormatError, match=f"{which}.{piece} must be finite.* at expert 3"):
            ExpertWeights(**parts)


@pytest.mark.parametrize("code", [0x7F, 0xFF, 0x90])
def test_a_block_scale_that_is_nan_or_negative_is_refused(code: int) -> None:
    w = make_weights("nvfp4")
    gate_up: Any = w.gate_up
    scale = gate_up.scale.view(torch.uint8).clone()
    scale[4, 7, 1] = code
    broken = dataclasses.replace(gate_up, scale=scale.view(torch.float8_e4m3fn))
    with pytest.raises(errors.FormatError, match=r"gate_up\.scale must be .* at expert 4"):
        ExpertWeights(broken, w.down)


@pytest.mark.parametrize("value", [2.0, True, "2", None, np.float32(2)])
def test_a_count_of_another_type_is_an_error_that_names_the_argument(value: Any) -> None:
    w, logits = make_weights(), torch.randn(3, 8)
    layer = FusedMoE(w, K, 16, tuner=moestro.AutoTuner())
    calls: dict[str, Any] = {
        "top_k": lambda: moestro.route(logits, value),
        "num_tokens": lambda: Uniform().sample(value, 8, 2),
        "num_experts": lambda: Uniform().sample(3, value, 2),
        "top_k ": lambda: FusedMoE(w, value, 16),
        "max_num_tokens": lambda: FusedMoE(w, K, value),
        "expert_offset": lambda: FusedMoE(w, K, 16, expert_offset=value),
        "num_tokens ": lambda: layer.decision(value),
    }
    if value is not None:
        calls |= {
            "num_experts ": lambda: fused_moe(*make_call(3), w, num_experts=value),
            "num_groups": lambda: moestro.route(logits, 2, "deepseek_v3", num_groups=value),
            "top_groups": lambda: moestro.route(logits, 2, "deepseek_v3", num_groups=4, top_groups=value),
            "max_num_tokens ": lambda: layer.tune(value, 1, progress=False),
        }
    for name, call in calls.items():
        with pytest.raises(errors.MoestroError, match=name.strip()):
            call()


def test_numpys_integers_are_counts() -> None:
    two = np.int64(2)
    ids, _ = moestro.route(torch.randn(3, 8), two)
    assert ids.shape == (3, 2)
    assert Uniform().sample(np.int32(3), np.int64(8), two).shape == (3, 2)
    w = make_weights()
    layer = FusedMoE(w, np.int64(K), np.int64(16), expert_offset=np.int64(0), num_experts=np.int64(E))
    call = make_call(5)
    assert error(layer(*call), *call, w) < 1e-2
    assert layer.runners[0].problem == FusedMoE(w, K, 16, num_experts=E).runners[0].problem
    assert layer.extra_repr()


@pytest.mark.parametrize("keywords", [{"alpha": math.nan}, {"limit": 0.0}, {"limit": -7}, {"up_shift": True}])
def test_parameters_of_an_activation_are_looked_at(keywords: dict[str, Any]) -> None:
    with pytest.raises(errors.BackendError, match=f"{next(iter(keywords))} of SwiGLU must be"):
        moestro.SwiGLU(**keywords)


def test_a_limit_of_infinity_is_no_limit() -> None:
    assert moestro.SwiGLU(limit=math.inf) == moestro.SwiGLU()
    assert moestro.SwiGLU(limit=7) == moestro.SwiGLU(limit=7.0)


def test_an_input_format_that_is_unknown_or_does_not_fit_x() -> None:
    w, (x, ids, weights) = make_weights(), make_call(3)
    with pytest.raises(errors.FormatError, match=r"unknown input_format 'fp9'.*fp8"):
        fused_moe(x, ids, weights, w, input_format="fp9")
    q = moestro.formats.NVFP4.quantize_rows(x)
    with pytest.raises(errors.FormatError, match="None or 'nvfp4' for an NVFP4 x, got 'fp8'"):
        fused_moe(q, ids, weights, w, input_format="fp8")
    with pytest.raises(errors.FormatError, match="x must be a tensor"):
        FusedMoE(w, K, 16, input_format="fp8")(q, ids, weights)


@pytest.mark.parametrize("tactic", ["loop", "pairs", ("grouped", 1), "masked"])
def test_float16_holds_what_its_range_does_not(tactic: Any) -> None:
    """Weights, sums and intermediates beyond 65504, results within: 19,200 was infinite, 0 was NaN."""
    gate_up, down = torch.zeros(2, 64, 64), torch.zeros(2, 64, 32)
    gate_up[:, :32, 0], gate_up[:, :32, 2], gate_up[:, 32:, 1] = -300, 300, 300
    down[:, 0, 0] = 2.0**-13
    w = ExpertWeights.from_dense(gate_up.half(), down.half(), "bf16")
    x = torch.zeros(2, 64, dtype=torch.float16)
    x[0, :2] = torch.tensor([300.0, 1])  # gate -90000
    x[1, 1:3] = torch.tensor([4.0, 440])  # gate 132000, up 1200, their product 1.6e8
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    y = fused_moe(x, ids, weights, w, backend="portable", tactic=tactic)
    expected = moestro.reference.fused_moe(x, ids, weights, w)
    assert torch.isfinite(expected).all()
    assert expected[1, 0] == pytest.approx(19_336, rel=1e-3)
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=1e-3)


# piece of a format -> what spoils one element of it
SPOILED = {
    ("nvfp4", "global_scale"): math.nan,
    ("nvfp4", "scale"): 0x7F,
    ("mxfp4", "scale"): 255,
    ("mxfp8", "scale"): 255,
    ("fp8_block", "scale_inv"): math.inf,
}


@pytest.mark.parametrize(("fmt", "piece"), SPOILED)
@pytest.mark.parametrize("how", ["whole", "portable", "auto"])
def test_a_spoiled_scale_is_refused_whole_and_expert_by_expert(fmt: str, piece: str, how: str) -> None:
    """What is packed expert by expert, as checkpoints are, is looked at on the way."""
    down: Any = make_weights(fmt).down
    scale = getattr(down, piece).clone()
    plain = scale if scale.is_floating_point() and scale.dtype.itemsize > 1 else scale.view(torch.uint8)
    plain.view(E, -1)[3, -1] = SPOILED[fmt, piece]
    broken = dataclasses.replace(down, **{piece: scale})
    gate_up: Any = make_weights(fmt).gate_up
    each = [(gate_up.expert(e), broken.expert(e)) for e in range(E)]
    make = ExpertWeights if how == "whole" else ExpertWeights.from_experts
    with pytest.raises(errors.FormatError, match=rf"down\.{piece} must be finite.* at expert 3"):
        make(*((gate_up, broken) if how == "whole" else (each, how)))


@pytest.mark.parametrize("value", ["yes", None, 2, 1.0, "False", [True]])
@pytest.mark.parametrize(
    "name", ["deterministic", "batch_invariant", "use_cuda_graph", "own_output", "donate"]
)
def test_a_switch_of_another_type_is_an_error_that_names_it(name: str, value: Any) -> None:
    w = make_weights()
    with pytest.raises(errors.BackendError, match=f"{name} must be True or False, got"):
        FusedMoE(w, K, 16, **{name: value})
    if name in ("deterministic", "batch_invariant"):
        with pytest.raises(errors.BackendError, match=f"{name} must be True or False, got"):
            fused_moe(*make_call(3), w, **{name: value if value.__hash__ else "x"})


def test_numpys_booleans_are_switches() -> None:
    w, given = make_weights(), make_call(3)
    assert torch.equal(fused_moe(*given, w, deterministic=np.True_), fused_moe(*given, w, deterministic=True))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_layer_is_made_tuned_and_called_under_any_default_device(device: str) -> None:
    w, given = make_weights(), make_call(3)
    with torch.device(device):
        layer = FusedMoE(w, K, 8, tuner=moestro.AutoTuner())
        layer.tune(budget_s=0.05, progress=False)
        for distribution in (Uniform(), moestro.routing.Zipf(1.0), moestro.routing.Balanced()):
            assert distribution.sample(5, 8, 2).device.type == "cpu"
    assert error(layer(*given), *given, w) < 3e-2


@pytest.mark.parametrize("how", ["portable", "auto"])
@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_an_expert_of_another_shape_is_named(how: str, fmt: str) -> None:
    w, other = make_weights(fmt), make_weights(fmt)
    each: list[Any] = [(w.gate_up.expert(e), w.down.expert(e)) for e in range(E)]  # type: ignore[attr-defined]
    cut: Any = other.gate_up
    each[4] = (
        type(cut)(*(piece[0, :-2] if piece.ndim > 1 else piece[0] for piece in cut.pieces)),
        each[4][1],
    )
    with pytest.raises(
        errors.ShapeError, match=r"gate_up of expert 4 must be \[160, 48\] as of expert 0, got \[158, 48\]"
    ):
        ExpertWeights.from_experts(each, how)


@pytest.mark.parametrize("name", ["tuner", "workspace"])
def test_a_layer_of_other_parts_is_an_error_that_names_them(name: str) -> None:
    with pytest.raises(errors.BackendError, match=f"{name} must be a .* or None, got 3"):
        FusedMoE(make_weights(), K, 16, **{name: 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [("probes", 5), ("probes", "zipf"), ("progress", 3), ("buckets", [4, 17]), ("buckets", "x")],
)
def test_settings_of_a_tuning_that_mean_nothing_are_named(name: str, value: Any) -> None:
    layer = FusedMoE(make_weights(), K, 16, tuner=moestro.AutoTuner())
    with pytest.raises(errors.MoestroError, match=f"{name} must be"):
        layer.tune(**{"budget_s": 0, "progress": False, name: value})


def test_experts_whose_ids_no_kernel_can_name_are_refused() -> None:
    w, (x, ids, weights) = make_weights(), make_call(3)
    last = 2**31 - E
    y = fused_moe(x, ids.long() + last, weights, w, expert_offset=last)
    assert torch.equal(y, fused_moe(x, ids, weights, w))
    for offset in (last + 1, 2**31, 2**63, 2**64):
        with pytest.raises(errors.RoutingError, match=f"expert_offset must be at most {last}.* got {offset}"):
            fused_moe(x, ids.long(), weights, w, expert_offset=offset)


def test_an_error_of_a_layers_first_call_comes_of_nothing_else() -> None:
    x, ids, weights = make_call(3)
    with pytest.raises(errors.ShapeError, match="x must be") as caught:
        FusedMoE(make_weights(), K, 16)(x[0], ids, weights)
    assert caught.value.__context__ is None

"""The portable backend with activations that are quantised, or come so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from portable_cases import ACTIVATIONS, FORMATS, TACTICS, E, K, fits, make

from moestro import reference
from moestro.formats import NVFP4
from moestro.kernels.portable.quantize import through
from moestro.kernels.problem import MoeProblem


@pytest.mark.parametrize("scales", [None, "one", "each"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_quantised_activations(tactic: Any, scales: str | None) -> None:
    for fmt in ("bf16", "nvfp4"):
        case = make(fmt, input_format="nvfp4", scales=scales, offset=2, bias=True)
        if fits(case, tactic, 33):
            assert case.error(case.inputs(33), tactic) < 1e-2
        exact = make(fmt, input_format="nvfp4", scales=scales, dtype=torch.float32)
        if fits(exact, tactic, 33):
            assert exact.error(exact.inputs(33), tactic) < 1e-5


@pytest.mark.parametrize("input_format", ["fp8", "int8"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_eight_bit_activations_equal_their_reference(tactic: Any, fmt: str, input_format: str) -> None:
    """Exactly but for the order of sums: float32 throughout, biases and a limit included."""
    case = make(fmt, ACTIVATIONS[3], dtype=torch.float32, bias=True, offset=2, input_format=input_format)
    inputs = case.inputs(17)
    inputs[0][3] = 0  # a token of zeros has no scale
    if fits(case, tactic, 17):
        assert case.error(inputs, tactic) < 1e-5


def test_eight_bit_activations_are_rounded_as_written_down() -> None:
    """By hand, in float64, on columns that are no multiple of a block."""
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).float()
    rows[1] *= 1e-30
    for kind, most, width in (("int8", 127.0, 32), ("fp8", 448.0, 300), ("fp8", 448.0, 128)):
        fmt = "fp8_block" if width == 128 else "nvfp4"
        problem = MoeProblem(E, E, 0, K, 300, 300, fmt, input_format=kind)
        for first in range(0, 300, width):
            part = rows[:, first : first + width]
            scale = (part.abs().amax(1, keepdim=True) / torch.tensor(most)).double()
            codes = part.double() / scale
            rounded = codes.round() if kind == "int8" else codes.float().to(torch.float8_e4m3fn).double()
            found = through(problem, rows, None)[:, first : first + width]
            torch.testing.assert_close(found, (rounded * scale).float(), rtol=3e-7, atol=0)
        assert torch.equal(through(problem, rows, None), reference.through(
            rows, kind, fp8_columns=128 if width == 128 else None
        ))  # fmt: skip


@pytest.mark.parametrize(("input_format", "low", "high"), [("fp8", 0.01, 0.06), ("int8", 0.004, 0.03)])
def test_eight_bit_activations_cost_what_is_written_down(input_format: str, low: float, high: float) -> None:
    case, plain = make("nvfp4", input_format=input_format), make("nvfp4")
    inputs = case.inputs(64)
    a, b = case.reference(inputs), plain.reference(inputs)
    assert low < float((a - b).norm() / b.norm()) < high


def test_weights_folded_to_e4m3_are_within_their_rounding() -> None:
    case = make("nvfp4")
    inputs = case.inputs(64)
    exact = case.reference(inputs)
    folded = reference.fused_moe(*inputs[:3], case.w, weight_rounding="e4m3")
    assert 0.005 < float((folded - exact).norm() / exact.norm()) < 0.06
    mxfp4 = make("mxfp4").w.gate_up.expert(0)  # one power of two apart at most here: folds exactly
    assert torch.equal(reference.fold_e4m3(mxfp4), mxfp4.dequantize())


def test_quantised_activations_differ_from_unquantised_ones() -> None:
    """What the test above would not see if input_format did nothing."""
    case, plain = make(input_format="nvfp4"), make()
    inputs = case.inputs(33)
    a, b = case.reference(inputs), plain.reference(inputs)
    assert 0.05 < float((a - b).norm() / b.norm()) < 0.5


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_activations_that_come_quantised(tactic: Any) -> None:
    case = make("nvfp4", input_format="nvfp4")
    x, ids, weights, out = case.inputs(17)
    q = NVFP4.quantize_rows(x)
    if fits(case, tactic, 17):
        assert case.error([q.packed, ids, weights, out, q.scale, q.global_scale], tactic) < 1e-2

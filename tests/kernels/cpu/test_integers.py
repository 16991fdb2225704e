"""Products in integers: int16 of AVX2, which is nearly exact, and int8, which is what moestro.reference defines."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import TACTICS, Case, relative_error, run
from test_correct import GPT_OSS, ISAS

from moestro.errors import BackendError
from moestro.kernels.activations import ReLU2
from moestro.kernels.cpu import CpuRunner, core

INT16 = [isa for isa in ISAS if isa in ("avx2", "avx_vnni")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(core.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("forced", INT16)
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("spread", [1.0, 50.0])
def test_int16_products_are_within_1e_3_of_exact_ones(
    forced: str, fmt: str, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain C++, which multiplies the bf16 numbers themselves and rounds at the same two places: what int16 adds,
    and what it tips over at a rounding."""
    case = Case(fmt, 96, 160, activation=GPT_OSS)
    x, ids, weights = case.call(19)
    x[:, 7] *= spread  # a channel as those of real models
    call = x, ids, weights
    monkeypatch.setenv(core.ISA_VARIABLE, "generic")
    exact = run(CpuRunner(case.problem, case.weights()), call).float()
    monkeypatch.setenv(core.ISA_VARIABLE, forced)
    runner = CpuRunner(case.problem, case.weights())
    assert runner.arithmetic == "int16"
    errors = {tactic: relative_error(run(runner, call, tactic), exact) for tactic in TACTICS}
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("forced", INT16)
@pytest.mark.parametrize("largest", [255.0, -255.0, 254.0])
def test_planes_of_bytes_and_words_give_the_same_sums(
    forced: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three tokens are multiplied in two planes of bytes, more in words. 255 has all the bits that bf16 has: as an
    int16 of at least 2^14 its upper byte would be 128."""
    case = Case(hidden=80, inter=48, experts=1, top_k=1)
    x, ids, weights = case.call(6)
    x[::2, ::16] = largest
    call = x, ids, weights
    monkeypatch.setenv(core.ISA_VARIABLE, "generic")
    exact = run(CpuRunner(case.problem, case.weights()), call).float()
    monkeypatch.setenv(core.ISA_VARIABLE, forced)
    runner = CpuRunner(case.problem, case.weights())
    words = run(runner, call)
    assert relative_error(words, exact) < 4e-3  # values so large tip few roundings over, each of them by 2^-8
    for count in (1, 2, 3):
        few = run(runner, (x[:count], ids[:count], weights[:count]))
        assert torch.equal(few, words[:count]), count


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_int8_is_what_the_reference_defines(isa: str, fmt: str, dtype: torch.dtype, num_tokens: int) -> None:
    sizes = (96, 160) if fmt == "mxfp4" else (80, 48)  # half a chunk is left over
    case = Case(fmt, *sizes, activation=GPT_OSS, biases=True, dtype=dtype, input_format="int8")
    w, call = case.weights(), case.call(num_tokens)
    runner, expected = CpuRunner(case.problem, w), case.expected(call, w)
    assert runner.arithmetic == "int8"
    errors = {tactic: relative_error(run(runner, call, tactic), expected) for tactic in TACTICS}
    # an intermediate on the boundary of two codes may fall to either side: a few of 127 steps, of a few values
    assert max(errors.values()) < 4e-3, errors


def test_int8_without_a_gate_and_with_an_odd_number_of_halves(isa: str) -> None:
    case = Case(hidden=48, inter=80, activation=ReLU2(), input_format="int8")
    call = case.call(9)
    expected = case.expected(call, case.weights())
    for tactic in TACTICS:
        assert relative_error(run(CpuRunner(case.problem, case.weights()), call, tactic), expected) < 4e-3


def test_int8_of_zeros_infinity_and_nan(isa: str) -> None:
    case = Case(input_format="int8")
    x, ids, weights = case.call(4)
    x[0], x[1, 5], x[2, 7] = 0, float("inf"), float("nan")
    y = run(CpuRunner(case.problem, case.weights()), (x, ids, weights))
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, False, True]))


@pytest.mark.parametrize("fmt", ["bf16", "fp8_block"])
def test_int8_goes_with_4_bit_weights_alone(fmt: str) -> None:
    case = Case(fmt, input_format="int8")
    with pytest.raises(BackendError, match=f"nvfp4 and mxfp4 weights, not {fmt}"):
        CpuRunner(case.problem, case.weights())


@pytest.mark.skipif(len(INT16) < 2, reason="this machine has no AVX-VNNI")
@pytest.mark.parametrize("input_format", [None, "int8"])
def test_avx_vnni_gives_the_bits_of_avx2(input_format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(hidden=528, inter=304, input_format=input_format)
    call, found = case.call(37), []
    for forced in INT16:
        monkeypatch.setenv(core.ISA_VARIABLE, forced)
        found += [run(CpuRunner(case.problem, case.weights()), call, tactic) for tactic in TACTICS]
    assert all(torch.equal(found[0], y) for y in found)

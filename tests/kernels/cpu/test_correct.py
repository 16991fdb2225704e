"""Every instruction set, format and path of the core against the float32 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_cases import TACTICS, Case, relative_error, run
from hypothesis import given, settings
from hypothesis import strategies as st

import moestro
from moestro import ExpertWeights
from moestro.formats import MXFP4, NVFP4, FP8Block
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.cpu import CpuRunner, CpuTactic, core

TOLERANCE = 4e-3  # two roundings to bf16 (the intermediate, the result) give 1.7e-3; the issue allows 1e-2
IN_32 = ("mxfp4", "int4")  # columns are multiples of 32
ISAS = core.available_isas() if core.why_no_core() is None else ()
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, up_shift=1.0)


def check(case: Case, num_tokens: int, tactic: Any = -1, seed: int = 0) -> None:
    w, call = case.weights(), case.call(num_tokens, seed)
    y = run(CpuRunner(case.problem, w), call, tactic)
    assert relative_error(y, case.expected(call, w)) < TOLERANCE


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(core.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("num_tokens", [1, 2, 70])
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16", "mxfp4", "fp8_block", "int4"])
def test_every_path_agrees_with_the_reference(isa: str, fmt: str, num_tokens: int) -> None:
    case = Case(fmt, 96, 160) if fmt in IN_32 else Case(fmt)
    w, call = case.weights(), case.call(num_tokens)
    runner = CpuRunner(case.problem, w)
    assert runner.isa == isa
    expected = case.expected(call, w)
    errors = {tactic: relative_error(run(runner, call, tactic), expected) for tactic in TACTICS}
    assert max(errors.values()) < TOLERANCE, errors


def test_gpt_oss_in_its_own_format(isa: str) -> None:
    check(Case("mxfp4", 96, 160, activation=GPT_OSS, biases=True), 9)


@pytest.mark.parametrize("activation", [SwiGLU(), GPT_OSS, GeGLUTanh(), ReLU2()])
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_activations_and_biases(isa: str, fmt: str, activation: Any) -> None:
    check(Case(fmt, activation=activation, biases=True), 9)


@pytest.mark.parametrize(("hidden", "inter"), [(16, 16), (32, 32), (48, 96), (528, 304)])
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_sizes_that_fill_no_tile(isa: str, fmt: str, hidden: int, inter: int) -> None:
    check(Case(fmt, hidden, inter, experts=3), 5)
    check(Case(fmt, hidden, inter, experts=3), 40, CpuTactic(token_tile=17, row_tile=2, dequant_from=3))


@pytest.mark.parametrize("count", range(1, 35))
def test_every_number_of_tokens_in_a_unit(isa: str, count: int) -> None:
    case = Case("bf16", experts=1, top_k=1)
    check(case, count)


def test_an_expert_may_get_all_tokens_and_others_none(isa: str) -> None:
    case = Case(top_k=1)
    w = case.weights()
    x, _, weights = case.call(75)
    call = (x, torch.full((75, 1), 4, dtype=torch.int32), weights)
    for tactic in TACTICS:
        assert (
            relative_error(run(CpuRunner(case.problem, w), call, tactic), case.expected(call, w)) < TOLERANCE
        )


def test_pairs_of_other_ranks_contribute_nothing(isa: str) -> None:
    case = Case(experts=5, offset=4, total=12)
    check(case, 33)


def test_ids_out_of_any_range_are_ignored(isa: str) -> None:
    case = Case(experts=4, offset=4, total=8)
    w, (x, ids, weights) = case.weights(), case.call(6)
    ids[:, 0] = torch.tensor([-1, 3, 8, 2**31 - 1, -(2**31), 4])
    call = (x, ids, weights)
    assert relative_error(run(CpuRunner(case.problem, w), call), case.expected(call, w)) < TOLERANCE
    nobody = (x, torch.full_like(ids, 8), weights)
    assert torch.equal(torch.zeros_like(x), run(CpuRunner(case.problem, w), nobody))


@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 6e-4), (torch.float32, 2e-6)])
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16", "mxfp4", "fp8_block", "int4"])
def test_float16_and_float32_lose_nothing_to_bf16(
    isa: str, fmt: str, dtype: torch.dtype, tolerance: float, num_tokens: int
) -> None:
    sizes = (96, 160) if fmt in IN_32 else (80, 48)
    case = Case(fmt, *sizes, activation=GPT_OSS, biases=True, dtype=dtype)
    w, call = case.weights(), case.call(num_tokens)
    runner, expected = CpuRunner(case.problem, w), case.expected(call, w)
    errors = {tactic: relative_error(run(runner, call, tactic), expected) for tactic in TACTICS}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_float16_intermediate_beyond_its_range_is_kept(isa: str, tokens: int) -> None:
    """300 · 300 is more than float16 holds, the result is not."""
    gate_up, down = torch.zeros(2, 64, 64), torch.zeros(2, 64, 32)
    gate_up[:, :, 0], down[:, :, 0] = 300.0, 2.0**-10
    w = moestro.ExpertWeights.from_dense(gate_up.bfloat16(), down.bfloat16(), format="bf16")
    x = torch.zeros(tokens, 64, dtype=torch.float16)
    x[:, 0] = 1.0
    call = x, torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1), w
    y = moestro.fused_moe(*call, backend="cpu")
    torch.testing.assert_close(y.float(), moestro.reference.fused_moe(*call), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_value_of_the_type_survives(isa: str, dtype: torch.dtype) -> None:
    """Experts that hand x through: relu(x)² of one column, times one: subnormals of float16 and large values too."""
    eye = torch.eye(16).bfloat16()[None]
    w = ExpertWeights.from_dense(eye, eye, format="bf16")
    case = Case("bf16", 16, 16, 1, 1, ReLU2(), dtype=dtype)
    x = torch.tensor(
        [1 / 3, 5.9e-8, 2.0**-14, 2.0**-24, 255.9, 1e-3, 0.0, -1.0, 65504.0**0.5, 7.7e-5, 1 + 2.0**-10, 3]
    )
    x = torch.nn.functional.pad(x, (0, 4))[None].to(dtype)
    y = run(CpuRunner(case.problem, w), (x, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)))
    assert torch.equal(y, (x.float().clamp(min=0) ** 2).to(dtype))


def test_infinities_and_nan_do_not_vanish(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        case = Case("bf16", dtype=dtype)
        x, ids, weights = case.call(3)
        x[1, 5], x[2, 7] = float("inf"), float("nan")
        y = run(CpuRunner(case.problem, case.weights()), (x, ids, weights))
        assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, False]))


def test_no_tokens(isa: str) -> None:
    case = Case()
    assert run(CpuRunner(case.problem, case.weights()), case.call(0)).shape == (0, case.hidden)


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_the_number_of_threads_changes_no_bit(
    isa: str, fmt: str, tactic: Any, set_torch_threads: Callable[[int], None]
) -> None:
    case = Case(fmt, hidden=160, inter=112)
    call, runner = case.call(41), CpuRunner(case.problem, case.weights())
    results = []
    for threads in (1, 2, 5):
        set_torch_threads(threads)
        results.append(run(runner, call, tactic))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_subnormal_block_scales_survive(isa: str) -> None:
    """e4m3's smallest values, 2^-9 .. 2^-7, where a decoder that flushes subnormals gives zeros."""
    case = Case()
    w, call = case.fresh_weights(), case.call(7)
    for part in (w.gate_up, w.down):
        part.scale.copy_((torch.arange(part.scale.numel()).view(part.scale.shape) % 9) / 512)
        part.global_scale.fill_(100.0)
    expected = case.expected(call, w)
    assert expected.norm() > 0
    for tactic in TACTICS:
        assert relative_error(run(CpuRunner(case.problem, w), call, tactic), expected) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(["nvfp4", "bf16"]),
    hidden=st.integers(1, 7),
    inter=st.integers(1, 7),
    experts=st.integers(1, 9),
    num_tokens=st.integers(1, 50),
    token_tile=st.integers(1, 40),
    row_tile=st.integers(1, 5),
    dequant_from=st.integers(1, 20),
    wave=st.integers(0, 60),
    seed=st.integers(0, 10**6),
)
def test_any_sizes_and_any_tactic(
    fmt: str, hidden: int, inter: int, experts: int, num_tokens: int, seed: int, **cut: int
) -> None:
    case = Case(fmt, 16 * hidden, 16 * inter, experts, top_k=min(experts, 2))
    check(case, num_tokens, CpuTactic(**cut), seed)


def one_column_at_a_time(fmt: str, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """relu(± column of gate_up)² of every column, rounded to bf16, and the same exactly.

    Rows hold codes 0 .. 15 over and over, under `scale` [R, blocks]; down is the identity.
    """
    make = NVFP4 if fmt == "nvfp4" else MXFP4
    inter, hidden = len(scale), scale.shape[1] * make.block
    codes = torch.arange(hidden) % 16
    one = torch.eye(hidden, inter, dtype=torch.int64) * 2  # the code of 1.0
    scales = (scale, torch.full((hidden, inter // make.block), 0x38 if fmt == "nvfp4" else 127))
    matrices: list[Any] = []
    for code, of in zip((codes.expand(inter, -1), one), scales, strict=True):
        packed, bits = (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)[None], of.to(torch.uint8)[None]
        nvfp4 = fmt == "nvfp4"
        matrices.append(
            NVFP4(packed, bits.view(torch.float8_e4m3fn), torch.ones(1)) if nvfp4 else MXFP4(packed, bits)
        )
    case = Case(fmt, hidden, inter, experts=1, top_k=1, activation=ReLU2())
    x = torch.cat([torch.eye(hidden), -torch.eye(hidden)]).bfloat16()
    call = x, torch.zeros(len(x), 1, dtype=torch.int32), torch.ones(len(x), 1)
    tactic = CpuTactic(token_tile=64, row_tile=1, dequant_from=1)
    y = run(CpuRunner(case.problem, ExpertWeights(*matrices)), call, tactic)
    h = x.double() @ matrices[0].dequantize(torch.float32)[0].double().T
    return y[:, :inter], h.relu().square().bfloat16()


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_decoding_first_is_exact_for_every_code_and_scale(isa: str, fmt: str) -> None:
    """Where the intermediate becomes int16 with the largest of 16, below its 2^-15 in values that are much smaller."""
    scale = torch.arange(128).view(
        32, 4
    )  # every e4m3 that is a number, and 2^-60 .. 2^60, whose squares are floats
    y, expected = one_column_at_a_time(
        fmt, (scale if fmt == "nvfp4" else scale + 67).clamp(max=126 if fmt == "nvfp4" else 187)
    )
    if core_arithmetic(fmt) == "int16":
        most = expected.view(len(expected), -1, 16).abs().amax(2).repeat_interleave(16, 1)
        assert bool(((y - expected).abs() <= most * 2.0**-15).all())
        expected = torch.where(expected.abs() >= most * 2.0**-7, expected, y)
    assert torch.equal(y, expected)


def core_arithmetic(fmt: str) -> str:
    """What products of bf16 tokens are made of on the instruction set that is forced."""
    case = Case(fmt, 96, 160)
    return CpuRunner(case.problem, case.weights()).arithmetic


def test_weights_beyond_floats_decode_to_infinity(isa: str) -> None:
    w = ExpertWeights(
        *(MXFP4(torch.full((1, 32, 16), 0x77).byte(), torch.full((1, 32, 1), 254).byte()) for _ in "ud")
    )
    call = torch.ones(1, 32).bfloat16(), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    runner = CpuRunner(Case("mxfp4", 32, 32, experts=1, top_k=1, activation=ReLU2()).problem, w)
    y = run(runner, call, CpuTactic(64, 1, dequant_from=1))  # 6 times 2^127; of infinity int16 makes NaN
    assert not y.isfinite().any()


@pytest.mark.parametrize("tactic", TACTICS)
def test_a_token_may_name_an_expert_more_than_once(isa: str, tactic: Any) -> None:
    case = Case(hidden=1056)
    w, (x, ids, weights) = case.weights(), case.call(1)
    call = x, torch.full_like(ids, 2), weights
    y = run(CpuRunner(case.problem, w), call, tactic)
    assert relative_error(y, case.expected(call, w)) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize(("hidden", "inter"), [(208, 80), (272, 304), (128, 64)])
def test_fp8_blocks_at_odd_edges(isa: str, hidden: int, inter: int, num_tokens: int) -> None:
    """Blocks of 128 x 128 that the matrix cuts short, and up rows that begin within one."""
    torch.manual_seed(0)  # one token's result is a few roundings to bf16: the same ones in each run
    case = Case("fp8_block", hidden, inter, experts=3)
    w, call = case.fresh_weights(), case.call(num_tokens)
    for part in (w.gate_up, w.down):
        part.scale_inv.mul_(torch.rand(part.scale_inv.shape) * 8 + 0.1)  # each its own, to be told apart
    expected = case.expected(call, w)
    for tactic in TACTICS:
        assert relative_error(run(CpuRunner(case.problem, w), call, tactic), expected) < TOLERANCE


def test_every_e4m3_code_is_decoded_exactly(isa: str) -> None:
    """relu(± code · x)² of one column: 126 magnitudes, subnormals among them."""
    codes = torch.arange(128).clamp(max=126).byte()
    gate_up = torch.zeros(1, 128, 128, dtype=torch.uint8)
    gate_up[0, :, 3] = codes
    gate_up[0, :, 4] = codes | 0x80
    eye = torch.eye(128).mul(0x38).byte()[None]  # the code of 1.0
    one = torch.ones(1, 1, 1)
    w = ExpertWeights(
        FP8Block(gate_up.view(torch.float8_e4m3fn), one), FP8Block(eye.view(torch.float8_e4m3fn), one)
    )
    case = Case("fp8_block", 128, 128, experts=1, top_k=1, activation=ReLU2())
    x = torch.zeros(2, 128).bfloat16()
    x[0, 3], x[1, 4] = 1, -1
    y = run(CpuRunner(case.problem, w), (x, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)))
    expected = codes.view(torch.float8_e4m3fn).float().square().bfloat16()
    assert torch.equal(y, torch.stack([expected, expected]))

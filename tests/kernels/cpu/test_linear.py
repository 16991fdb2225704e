"""A Linear layer on the CPU core, on every instruction set here, against float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import formats
from moestro.errors import BackendError, FormatError
from moestro.kernels.cpu import core, linear
from moestro.kernels.cpu.linear import CpuLinear
from moestro.moe.workspace import Workspace

ISAS = core.available_isas() if core.why_no_core() is None else ()
SIZES = {"nvfp4": (37, 80), "mxfp4": (49, 96), "fp8_block": (150, 200), "bf16": (45, 41)}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}


def weight(format: str, rows: int, columns: int, seed: int = 0) -> Any:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    return formats.get(format).quantize(dense.bfloat16() if format == "bf16" else dense)


def made(source: Any, dtype: torch.dtype, biased: bool = False, **options: Any) -> CpuLinear:
    return CpuLinear(linear.pack(source), *source.shape, biased, dtype, **options)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_product_is_that_of_the_dequantised_weight(
    format: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESTRO_CPU_ISA", isa)
    source, bias = weight(format, *SIZES[format]), torch.randn(SIZES[format][0])
    runner, workspace = made(source, dtype, True), Workspace("cpu")
    for tokens in (1, 2, 4, 5, 13, 33, 300):
        x = torch.randn(tokens, source.shape[1]).to(dtype)
        expected = torch.nn.functional.linear(x.float(), source.dequantize(), bias)
        y = runner(x, workspace, bias)
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        assert error(y, expected) < TOLERANCE[dtype], tokens


@pytest.mark.parametrize("format", SIZES)
def test_the_result_has_the_same_bits_on_one_thread_and_on_three(
    format: str, set_torch_threads: Callable[[int], None]
) -> None:
    source = weight(format, 400, 96 if format == "mxfp4" else 80)
    runner, workspace = made(source, torch.bfloat16), Workspace("cpu")
    results = []
    for threads in (1, 3):
        set_torch_threads(threads)
        results.append([runner(torch.ones(n, source.shape[1]).bfloat16(), workspace) for n in (1, 7, 270)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_int8_activations_are_near(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CPU_ISA", isa)
    source = weight("nvfp4", 64, 96)
    runner = made(source, torch.float32, input_format="int8")
    x = torch.randn(9, 96)
    assert 1e-4 < error(runner(x, Workspace("cpu")), x @ source.dequantize().T) < 2e-2


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(list(SIZES)),
    rows=st.integers(1, 150),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_back_what_was_packed(format: str, rows: int, blocks: int, seed: int) -> None:
    columns = {"nvfp4": 16, "mxfp4": 32, "fp8_block": 9, "bf16": 7}[format] * blocks
    source = weight(format, rows, columns, seed)
    back = linear.unpack(linear.pack(source), rows, columns)
    assert (back.shape, type(back)) == (source.shape, type(source))
    assert torch.equal(back.dequantize(), source.dequantize())


def test_no_tokens_give_no_rows() -> None:
    source = weight("nvfp4", 37, 80)
    assert made(source, torch.bfloat16)(torch.empty(2, 0, 80).bfloat16(), Workspace("cpu")).shape == (
        2,
        0,
        37,
    )


def test_what_the_core_does_not_run_is_said() -> None:
    assert "not mxfp8" in str(linear.why_not("mxfp8", None))
    assert "not float32" in str(linear.why_not("bf16", torch.float32))
    assert "int8" in str(linear.why_not("fp8_block", None, "int8"))
    source = weight("nvfp4", 32, 32)
    with pytest.raises(BackendError, match="takes x in bfloat16, float16, float32, not float64"):
        made(source, torch.float64)
    source.scale.view(torch.uint8)[0, 0] = 0x7F
    with pytest.raises(FormatError, match="NaN"):
        linear.pack(source)

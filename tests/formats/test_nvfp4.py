"""NVFP4: the recipe, its values and its limits, against the definition in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_formats import E4M3, from_nibbles, nvfp4
from torch._subclasses.fake_tensor import FakeTensorMode

from moestro.formats import FORMATS, NVFP4, pieces
from moestro.formats.nvfp4 import BLOCK, RANGE

SHAPES = [(1, 16), (7, 48), (33, 160)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def values_of(q: NVFP4) -> np.ndarray:
    """e2m1 · scale · global_scale in float64, piece by piece."""
    scale = q.scale.float().double().numpy().repeat(BLOCK, axis=-1)
    return from_nibbles(q.packed) * scale * q.row_global_scale().double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_follows_the_two_level_recipe(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = randn(*shape, dtype=dtype) * torch.logspace(-3, 2, shape[0], dtype=dtype).unsqueeze(-1)
    q = NVFP4.quantize(dense)
    values, scale, global_scale = nvfp4(dense)
    assert q.global_scale.item() == global_scale
    np.testing.assert_array_equal(scale, q.scale.float().numpy())
    np.testing.assert_array_equal(values, from_nibbles(q.packed))


def test_quantise_under_a_given_global_scale_follows_it_and_saturates() -> None:
    dense = randn(5, 64)
    q = NVFP4.quantize(dense, torch.tensor(2.0**-12))  # reaches ±0.656
    values, scale, _ = nvfp4(dense, 2.0**-12)
    np.testing.assert_array_equal(scale, q.scale.float().numpy())
    np.testing.assert_array_equal(values, from_nibbles(q.packed))
    assert q.dequantize().abs().max() == RANGE * 2.0**-12 < dense.abs().max()


def test_each_matrix_has_its_own_global_scale_and_equals_itself_alone() -> None:
    dense = randn(2, 3, 5, 32) * torch.tensor([1.0, 10, 100]).view(3, 1, 1)
    q = NVFP4.quantize(dense)
    assert q.global_scale.shape == (2, 3)
    alone = NVFP4.quantize(dense[1, 2])
    assert torch.equal(alone.packed, q.packed[1, 2])
    assert torch.equal(alone.global_scale, q.global_scale[1, 2])


def test_row_groups_keep_their_own_scale() -> None:
    gate, up = randn(4, 6, 32), 50 * randn(4, 6, 32, seed=1)
    q = NVFP4.quantize(torch.cat((gate, up), dim=1), row_groups=2)
    assert q.global_scale.shape == (4, 2)
    assert q.row_groups == 2
    both = NVFP4.cat_rows([NVFP4.quantize(gate), NVFP4.quantize(up)])
    assert (both.shape, both.row_groups) == ((4, 12, 32), 2)
    for piece, other in zip(q.pieces, both.pieces, strict=True):
        assert torch.equal(piece.view(torch.uint8), other.view(torch.uint8))
    expected = torch.cat((NVFP4.quantize(gate).dequantize(), NVFP4.quantize(up).dequantize()), dim=1)
    assert torch.equal(expected, q.dequantize())
    assert torch.equal(expected[3], q.expert(3).dequantize())


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_keep_their_sign(zero: float) -> None:
    q = NVFP4.quantize(torch.full((2, 32), zero))
    assert not q.scale.float().signbit().any()
    assert torch.equal(torch.full((2, 32), zero).signbit(), q.dequantize().signbit())


def test_zeros_stay_zero_under_a_positive_global_scale() -> None:
    dense = torch.zeros(2, 3, 32)
    dense[1, 0, :16] = 3.0
    q = NVFP4.quantize(dense)
    assert q.global_scale[0] == 1
    assert q.global_scale[1] > 0
    back = q.dequantize()
    assert torch.equal(dense == 0, back == 0)
    torch.testing.assert_close(back, dense, rtol=3e-7, atol=0)


@pytest.mark.parametrize("value", [1.0, -0.1, 3e38, 1e-30, 448.0])
def test_equal_values_come_back_to_float32_accuracy(value: float) -> None:
    dense = torch.full((3, 32), value)
    torch.testing.assert_close(NVFP4.quantize(dense).dequantize(), dense, rtol=3e-7, atol=0)


@pytest.mark.parametrize("peak", [torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max, 1e-36])
def test_extreme_magnitudes_keep_their_relative_accuracy(peak: float) -> None:
    x = randn(9, 64)
    dense = x / x.abs().max() * peak
    back = NVFP4.quantize(dense).dequantize(torch.float64)
    assert torch.isfinite(back.float()).all()
    assert (back - dense.double()).norm() < 0.12 * dense.double().norm()


@pytest.mark.parametrize("peak", [1e-38, 1e-40, 1e-45])
def test_denormal_values_come_back_within_three_of_the_smallest_steps(peak: float) -> None:
    """The global scale stays a normal float32, 2^-126: blocks of less than 3 steps become zero."""
    x = randn(9, 64)
    dense = x / x.abs().max() * peak
    q = NVFP4.quantize(dense)
    assert q.global_scale == 2.0**-126
    step = torch.maximum(q.scale.double().repeat_interleave(16, -1), torch.tensor(2.0**-9)) * 2.0**-126
    assert ((q.dequantize(torch.float64) - dense.double()).abs() <= 3 * step).all()


def test_subnormal_block_scales_survive_and_smaller_ones_are_zero() -> None:
    dense = torch.zeros(5, 16)
    dense[0, 0] = RANGE  # global scale 1
    for row, scale in enumerate((2.0**-9, 3 * 2.0**-9, 2.0**-6, 2.0**-11), start=1):
        dense[row] = 6 * scale
    q = NVFP4.quantize(dense)
    assert q.scale.float().flatten().tolist() == [448.0, 2.0**-9, 3 * 2.0**-9, 2.0**-6, 0.0]
    assert torch.equal(dense[:4], q.dequantize()[:4])
    assert torch.equal(torch.zeros(16), q.dequantize()[4])


def test_dequantise_is_exact_for_every_scale_and_code() -> None:
    scale = (
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(-1)
    )  # NaN at 0x7F and 0xFF
    packed = torch.arange(0, 256, 17, dtype=torch.uint8)[torch.arange(8) * 2 % 16].repeat(256, 1)
    packed = torch.cat((packed, packed.flip(-1) + 17), dim=-1)
    q = NVFP4(packed, scale.repeat(1, 2), torch.tensor(0.3))
    expected = torch.from_numpy(values_of(q))
    torch.testing.assert_close(q.dequantize(torch.float64), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q.dequantize(), expected.float(), rtol=0, atol=0, equal_nan=True)
    unscaled = torch.from_numpy(from_nibbles(packed)) * scale.double().repeat_interleave(32, -1)
    for dtype in DTYPES:
        values = q.dequantize_unscaled(dtype)
        assert values.dtype == dtype
        torch.testing.assert_close(values.double(), unscaled, rtol=0, atol=0, equal_nan=True)
    assert E4M3[-1] == scale.float()[0x7E]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantise_rounds_the_exact_value_and_fills_out(dtype: torch.dtype) -> None:
    q = NVFP4.quantize(randn(3, 5, 48), row_groups=5)
    exact = q.dequantize(torch.float32 if dtype != torch.float64 else dtype)
    assert torch.equal(exact.to(dtype), q.dequantize(dtype))
    out = torch.full((3, 5, 48), torch.nan, dtype=dtype)
    assert q.dequantize(dtype, out=out) is out
    assert torch.equal(q.dequantize(dtype), out)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 4))
@settings(max_examples=40)
def test_every_value_is_within_half_a_step_of_its_block(
    seed: int, rows: int, blocks: int, spread: float
) -> None:
    """Half a step is s/4 below 2s, s/2 below 4s and s above, for s = scale · global_scale.

    The largest value of a block may lie 1/16 above 6s, since the scale itself is rounded.
    """
    x = randn(rows, 16 * blocks, seed=seed % 2**31)
    dense = x.sign() * x.abs() ** spread
    q = NVFP4.quantize(dense)
    step = (q.scale.double() * q.global_scale.double()).repeat_interleave(16, -1)
    normal = step > 2.0**-6 * q.global_scale  # a subnormal scale is rounded more coarsely
    ratio = dense.double() / step
    half = torch.where(ratio.abs() <= 2, 0.25, torch.where(ratio.abs() <= 4, 0.5, 1.0))
    assert (ratio.abs()[normal] <= 6 * (1 + 1 / 16) + 1e-6).all()
    assert ((ratio - q.dequantize(torch.float64) / step).abs() <= half + 1e-6)[normal].all()


@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.floats(-30, 30))
@settings(max_examples=40)
def test_quantising_again_changes_nothing(seed: int, rows: int, exponent: float) -> None:
    """Where no block's scale is subnormal: every block then has a code for 6, which gives its scale back."""
    q = NVFP4.quantize(randn(rows, 64, seed=seed) * 2.0**exponent)
    again = NVFP4.quantize(q.dequantize(), q.global_scale)
    assert torch.equal(q.packed, again.packed)
    assert torch.equal(q.dequantize(), again.dequantize())


@pytest.mark.parametrize("global_scale", [None, "one", "per row"])
def test_rows_are_quantised_each_on_its_own(global_scale: str | None) -> None:
    x = randn(7, 64, dtype=torch.bfloat16) * torch.logspace(-4, 4, 7, dtype=torch.bfloat16).unsqueeze(-1)
    scale = {None: None, "one": torch.tensor(0.7), "per row": torch.linspace(0.1, 9, 7)}[global_scale]
    q = NVFP4.quantize_rows(x, scale)
    assert q.shape == (7, 64)
    for n in range(7):
        values, scales, g = nvfp4(x[n : n + 1], None if scale is None else float(scale.expand(7)[n]))
        np.testing.assert_array_equal(values, from_nibbles(q.packed[n : n + 1]))
        np.testing.assert_array_equal(scales, q.scale[n : n + 1].float().numpy())
        assert q.row_global_scale().expand(7, 1)[n] == g


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_the_others_stay(bad: float) -> None:
    x = randn(3, 32)
    clean = NVFP4.quantize_rows(x).dequantize()
    x[1, 20] = bad
    back = NVFP4.quantize_rows(x).dequantize()
    assert back[1].isnan().all()
    assert torch.equal(clean[[0, 2]], back[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 4, 32), (2, 0, 32)])
def test_empty_tensors_quantise_to_empty(shape: tuple[int, ...]) -> None:
    q = NVFP4.quantize(torch.empty(shape))
    assert (q.shape, tuple(q.dequantize().shape)) == (shape, shape)
    if len(shape) == 2:
        assert NVFP4.quantize_rows(torch.empty(shape)).dequantize().shape == shape


def test_chunks_and_strides_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = randn(3, 10, 48)
    whole = NVFP4.quantize(dense, row_groups=2)
    monkeypatch.setattr(pieces, "CPU_CHUNK", 3 * 48 + 1)
    strided = dense.transpose(0, 2).contiguous().transpose(0, 2)
    chunked = NVFP4.quantize(strided, row_groups=2)
    assert torch.equal(whole.packed, chunked.packed)
    assert torch.equal(whole.dequantize(), chunked.dequantize())
    x = dense[0]
    assert torch.equal(NVFP4.quantize_rows(x).packed, NVFP4.quantize(x, row_groups=10).packed)


def test_checkpoint_layouts_multiply_or_divide_by_their_global_scale() -> None:
    q = NVFP4.quantize(randn(3, 4, 32))
    assert torch.equal(q.dequantize(), NVFP4.from_modelopt(q.packed, q.scale, q.global_scale).dequantize())
    one = q.expert(1)
    divisor = (1 / one.global_scale).reshape(1)  # as on disk: [1]
    same = NVFP4.from_compressed_tensors(one.packed, one.scale, divisor)
    torch.testing.assert_close(same.dequantize(), one.dequantize(), rtol=3e-7, atol=0)
    assert torch.equal(
        one.dequantize(), NVFP4.from_modelopt(one.packed, one.scale, one.global_scale).dequantize()
    )


def test_rows_quantise_under_compile_and_without_waiting_for_the_device() -> None:
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        return NVFP4.quantize_rows(x).dequantize(x.dtype)

    compiled = torch.compile(round_trip, backend="eager", fullgraph=True, dynamic=True)
    for n in (3, 17):
        x = randn(n, 64, seed=n, dtype=torch.bfloat16)
        assert torch.equal(round_trip(x), compiled(x))
    with FakeTensorMode():  # has no values: reading one back to the host raises
        assert round_trip(torch.empty(9, 64)).shape == (9, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_bytes() -> None:
    dense = randn(3, 100, 512) * torch.logspace(-9, 9, 100).unsqueeze(-1)
    for cls in FORMATS.values():
        here, there = cls.quantize(dense), cls.quantize(dense.cuda())
        assert there.device.type == "cuda"
        for a, b in zip(here.pieces, there.pieces, strict=True):
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
        assert torch.equal(here.dequantize(torch.bfloat16), there.dequantize(torch.bfloat16).cpu())
    rows = NVFP4.quantize_rows(dense[0].cuda())
    assert torch.equal(NVFP4.quantize_rows(dense[0]).packed, rows.packed.cpu())

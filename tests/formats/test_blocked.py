"""MXFP4 and FP8 in blocks, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_formats import from_nibbles, round_e2m1, round_e4m3

from moestro.formats import MXFP4, FP8Block, pieces


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mxfp4_takes_the_least_power_of_two_that_brings_the_maximum_below_seven() -> None:
    dense = randn(2, 5, 96) * torch.logspace(-20, 20, 5).unsqueeze(-1)
    q = MXFP4.quantize(dense)
    amax = dense.reshape(2, 5, 3, 32).abs().amax(-1).double().numpy()
    exponent = np.array([next(e for e in range(-127, 126) if a < 7 * 2.0**e) for a in amax.flat]).reshape(
        amax.shape
    )
    np.testing.assert_array_equal(exponent + 127, q.scale.numpy())
    unit = 2.0 ** exponent.repeat(32, -1)
    expected = round_e2m1(dense.double().numpy() / unit) * unit
    np.testing.assert_array_equal(expected, q.dequantize(torch.float64).numpy())
    np.testing.assert_array_equal(expected.astype(np.float32), q.dequantize().numpy())


def test_mxfp4_decodes_every_scale() -> None:
    scale = torch.arange(256, dtype=torch.uint8).view(2, 128, 1)
    packed = torch.arange(16, dtype=torch.uint8).expand(2, 128, 16).contiguous()
    power = torch.tensor([2.0**e for e in range(-127, 128)] + [torch.nan], dtype=torch.float64).view(
        2, 128, 1
    )
    expected = torch.from_numpy(from_nibbles(packed)) * power
    torch.testing.assert_close(
        MXFP4(packed, scale).dequantize(torch.float64), expected, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        MXFP4(packed, scale).dequantize(torch.bfloat16), expected.bfloat16(), rtol=0, atol=0, equal_nan=True
    )


@given(st.integers(0, 2**31 - 1), st.floats(-100, 100))
@settings(max_examples=40)
def test_mxfp4_values_are_within_half_a_step_and_quantising_again_changes_nothing(
    seed: int, exponent: float
) -> None:
    dense = randn(3, 64, seed=seed) * 2.0**exponent
    q = MXFP4.quantize(dense)
    unit = 2.0 ** (q.scale.double().repeat_interleave(32, -1) - 127)
    ratio = dense.double() / unit
    half = torch.where(ratio.abs() <= 2, 0.25, torch.where(ratio.abs() <= 4, 0.5, 1.0))
    assert ((ratio - q.dequantize(torch.float64) / unit).abs() <= half).all()
    assert torch.equal(q.dequantize(), MXFP4.quantize(q.dequantize()).dequantize())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.75 * 2.0**127, torch.finfo(torch.float32).max])
def test_mxfp4_holds_extremes_without_overflow(value: float) -> None:
    back = MXFP4.quantize(torch.full((1, 32), value)).dequantize()
    assert torch.isfinite(back).all()
    step = max(2.0**-127, value / 3)
    assert ((back - value).abs() <= step).all()


def test_mxfp4_reads_gpt_oss_blocks() -> None:
    q = MXFP4.quantize(randn(2, 6, 64))
    blocks = q.packed.view(2, 6, 2, 16)
    same = MXFP4.from_gpt_oss(blocks, q.scale)
    assert same.packed.data_ptr() == q.packed.data_ptr()
    assert torch.equal(q.dequantize(), same.dequantize())


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (2, 300, 100), (3, 128, 640)])
def test_fp8_blocks_of_128_with_ragged_edges(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CPU_CHUNK", 1)
    dense = randn(*shape) * torch.logspace(-6, 3, shape[-1])
    q = FP8Block.quantize(dense)
    x = dense.view(-1, *shape[-2:]).numpy()
    scale_inv = q.scale_inv.view(-1, *q.scale_inv.shape[-2:]).numpy()
    back = q.dequantize().view(x.shape).numpy()
    exact = q.dequantize(torch.float64).view(x.shape).numpy()
    for i, r, c in np.ndindex(scale_inv.shape):
        at = (i, slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
        scale = np.abs(x[at]).max() / np.float32(448)
        assert scale == scale_inv[i, r, c]
        np.testing.assert_array_equal(round_e4m3(x[at] / scale) * np.float64(scale), exact[at])
    np.testing.assert_array_equal(exact.astype(np.float32), back)


def test_fp8_blocks_of_zeros_are_zero_and_half_types_round_once() -> None:
    dense = randn(200, 200)
    dense[:128, :128] = 0
    q = FP8Block.quantize(dense.bfloat16())
    assert q.scale_inv[0, 0] == 1
    assert torch.equal(torch.zeros(128, 128), q.dequantize()[:128, :128])
    assert torch.equal(q.dequantize().bfloat16(), q.dequantize(torch.bfloat16))
    assert (q.dequantize() - dense).norm() < 0.04 * dense.norm()

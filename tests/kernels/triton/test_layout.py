"""The repacked weights stand for the same values, and can be unpacked bit for bit."""

from __future__ import annotations

import pytest
import torch

from moestro.formats import NVFP4

pytest.importorskip("triton")

from moestro.formats.base import FormatTensor
from moestro.kernels.triton import TritonNVFP4
from moestro.kernels.triton.layout import PLACES, row_order

SHAPES = [(2, 64, 64), (3, 48, 80), (1, 130, 16), (2, 16, 208)]


def every_code(shape: tuple[int, int, int], seed: int = 0) -> NVFP4:
    """Random codes under random non-zero scales, subnormal ones and the largest included."""
    gen = torch.Generator().manual_seed(seed)
    e, r, c = shape
    packed = torch.randint(0, 256, (e, r, c // 2), dtype=torch.uint8, generator=gen)
    scale = torch.randint(1, 127, (e, r, c // 16), dtype=torch.uint8, generator=gen)
    groups = torch.rand(e, 2, generator=gen) + 0.5
    return NVFP4(packed, scale.view(torch.float8_e4m3fn), groups)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacks_bit_for_bit(shape: tuple[int, int, int], gated: bool) -> None:
    q = every_code(shape)
    back = TritonNVFP4.pack(q, gated).to_checkpoint()
    assert torch.equal(q.packed, back.packed)
    assert torch.equal(q.scale.view(torch.uint8), back.scale.view(torch.uint8))
    assert torch.equal(q.global_scale, back.global_scale)


def test_every_scale_survives() -> None:
    """All 126 positive e4m3 values, the 7 subnormals among them (Marlin's layout loses the smallest)."""
    scale = torch.arange(1, 127, dtype=torch.uint8).view(1, 126, 1).view(torch.float8_e4m3fn)
    packed = torch.arange(8, dtype=torch.uint8).mul(33).expand(1, 126, 8).contiguous()
    q = NVFP4(packed, scale, torch.ones(1))
    assert torch.equal(q.dequantize(torch.float64), TritonNVFP4.pack(q, False).dequantize(torch.float64))


def test_zero_and_negative_scales_keep_their_values() -> None:
    q = every_code((1, 32, 64))
    bits = q.scale.view(torch.uint8).clone()
    bits[:, ::3] = 0
    bits[:, 1::3] |= 128
    q = NVFP4(q.packed, bits.view(torch.float8_e4m3fn), q.global_scale)
    expected = q.dequantize(torch.float64)
    assert torch.equal(expected, TritonNVFP4.pack(q, True).dequantize(torch.float64))


def test_is_a_format_tensor_that_gives_its_experts() -> None:
    q = every_code((3, 64, 80))
    packed = TritonNVFP4.pack(q, True)
    assert isinstance(packed, FormatTensor)
    assert packed.shape == q.shape
    assert torch.equal(q.expert(1).dequantize(), packed.expert(1).dequantize())
    assert torch.equal(q.dequantize(), packed.to("cpu").dequantize())


def test_costs_nine_sixteenths_of_a_byte_a_weight_on_whole_blocks() -> None:
    q = every_code((2, 128, 256))
    packed = TritonNVFP4.pack(q, True)
    assert (packed.words.nbytes + packed.scales.nbytes) / (2 * 128 * 256) == 0.5625


def test_a_gate_and_its_up_are_eight_rows_apart() -> None:
    order = row_order(80, True, torch.device("cpu"))  # 40 of gate, 40 of up, padded to 128
    assert len(order) == 128
    for start in range(0, 128, 16):
        gate, up = order[start : start + 8], order[start + 8 : start + 16]
        there = gate >= 0
        assert torch.equal(gate[there] + 40, up[there])
        assert bool((up[~there] == -1).all())


def test_the_places_of_the_four_codes_fill_a_word_once() -> None:
    used = [mask << shift for pieces in PLACES for mask, shift in pieces]
    assert sum(used) == 0xFFFF

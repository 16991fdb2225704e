"""The repacked weights stand for the same values, and can be unpacked bit for bit."""

from __future__ import annotations

import pytest
import torch

from moestro.formats import MXFP4, NVFP4, FP8Block

pytest.importorskip("triton")

from packed_cases import every_checkpoint, every_code

from moestro.formats.base import FormatTensor
from moestro.kernels.triton import TritonNVFP4
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.words import PLACES, kernel_rows_of, row_order

SHAPES = [(2, 64, 64), (3, 48, 80), (1, 130, 16), (2, 16, 208)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", every_checkpoint())
def test_every_format_comes_back_bit_for_bit(fmt: str, gated: bool) -> None:
    q, form = every_checkpoint()[fmt]
    packed = form.pack(q, gated)
    assert isinstance(packed, FormatTensor)
    assert packed.words.shape[1] * 64 == kernel_rows_of(q.shape[1], gated) == packed.row_scale.shape[1]
    back = packed.to_checkpoint()
    for name in q.piece_names:
        assert torch.equal(getattr(q, name).view(torch.uint8), getattr(back, name).view(torch.uint8)), name
    assert torch.equal(q.expert(1).dequantize(), packed.expert(1).dequantize())


@pytest.mark.parametrize(
    ("fmt", "nbytes"),
    [("nvfp4", 0.5625), ("mxfp4", 0.5625), ("mxfp8", 1.0625), ("fp8_block", 1.015625), ("int4", 0.625)],
)
def test_a_format_states_the_bytes_of_a_weight(fmt: str, nbytes: float) -> None:
    q, form = every_checkpoint()[fmt]
    packed = form.pack(q, False)
    assert form.bytes_per_weight() == nbytes
    assert packed.words.nbytes + packed.scales.nbytes == nbytes * packed.words.shape[:3].numel() * 64 * 64


def test_powers_of_two_far_below_their_rows_largest_are_zeros_and_unknown_ones_make_their_row_unknown() -> (
    None
):
    packed = torch.full((1, 64, 32), 0x22, dtype=torch.uint8)  # ones
    scale = torch.full((1, 64, 2), 127, dtype=torch.uint8)
    scale[0, 0] = torch.tensor([252, 0])
    scale[0, 1, 1] = 255
    form = PACKED["mxfp4"].pack(MXFP4(packed, scale), False)
    assert form.row_scale[0, 0] == 2.0**125
    assert form.scales[0, 0, 0, 0].item() == 253 << 7 | 1 << 23  # 2^126, and 2^-126
    assert bool(form.row_scale[0, 1].isnan())


def test_a_byte_that_is_no_number_makes_its_row_unknown() -> None:
    data = torch.ones(1, 64, 64, dtype=torch.uint8)
    data[0, 5, 7] = 0xFF
    packed = PACKED["fp8_block"].pack(FP8Block(data.view(torch.float8_e4m3fn), torch.ones(1, 1, 1)), False)
    assert packed.row_scale[0].isnan().nonzero().tolist() == [[5]]


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

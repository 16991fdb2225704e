"""4-bit weights in the layout of FP8 products: what they are worth, and how the kernels' arithmetic decodes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import FormatError
from moestro.formats import MXFP4, NVFP4, FP8Block
from moestro.kernels.triton import fp8_layout
from moestro.kernels.triton.fp8_layout import (
    HALVES,
    LARGEST,
    PACKED_FP8,
    SMALLEST,
    FP8FromMXFP4,
    FP8FromNVFP4,
    TritonE4M3,
)
from moestro.kernels.triton.layout import Packed
from moestro.moe import reference
from moestro.moe.weights import ExpertWeights

STEP = 1 / 16  # of e4m3: half a step, relative


def dense(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen) * torch.exp(2 * torch.randn((*shape[:-1], 1), generator=gen))


def of_any_scales(experts: int, whole: torch.Tensor, mx: bool, gen: torch.Generator) -> NVFP4 | MXFP4:
    """Weights [experts, 64, 64] of random codes and scales but NaN; whole: NVFP4's global scales."""
    packed = torch.randint(0, 256, (experts, 64, 32), dtype=torch.uint8, generator=gen)
    if mx:
        return MXFP4(packed, torch.randint(0, 250, (experts, 64, 2), dtype=torch.uint8, generator=gen))
    codes = torch.randint(0, 256, (experts, 64, 4), dtype=torch.uint8, generator=gen)
    codes = torch.where(codes & 127 == 127, 3, codes).to(torch.uint8)  # no NaN
    return NVFP4(packed, codes.view(torch.float8_e4m3fn), whole)


def norm_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("rows", "columns", "gated"), [(96, 160, True), (72, 128, False), (130, 96, True), (64, 32, False)]
)
def test_nvfp4_is_rounded_to_e4m3_and_no_further(rows: int, columns: int, gated: bool) -> None:
    q = NVFP4.quantize(dense(3, rows, columns))
    found, exact = FP8FromNVFP4.pack(q, gated).dequantize(), q.dequantize(torch.float32)
    assert torch.all((found - exact).abs() <= STEP * exact.abs() * (1 + 1e-6))
    assert norm_error(found, exact) < 0.03


@pytest.mark.parametrize(("rows", "columns", "gated"), [(96, 160, True), (72, 128, False)])
def test_mxfp4_is_exact_within_eleven_powers_of_two(rows: int, columns: int, gated: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (2, rows, columns // 2), dtype=torch.uint8, generator=gen)
    scale = torch.randint(100, 112, (2, rows, columns // 32), dtype=torch.uint8, generator=gen)
    q = MXFP4(packed, scale)
    assert torch.equal(FP8FromMXFP4.pack(q, gated).dequantize(), q.dequantize(torch.float32))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_any_scales_stay_within_the_documented_error(seed: int, mx: bool) -> None:
    """Zero, subnormal, negative and far smaller scales included: at most half a step of e4m3, or of the smallest grid."""
    gen = torch.Generator().manual_seed(seed)
    q = of_any_scales(1, torch.ones(1), mx, gen)
    scale = fp8_layout.decode_e8m0(q.scale) if mx else q.scale.float().abs()
    largest = scale.amax(-1, keepdim=True)
    kind = FP8FromMXFP4 if mx else FP8FromNVFP4
    found, exact = kind.pack(q, False).dequantize(torch.float64), q.dequantize(torch.float64)
    grid = largest.double() * SMALLEST / (LARGEST / 2)  # the smallest scale that is kept, at most
    assert torch.all((found - exact).abs() <= torch.maximum(STEP * exact.abs() * (1 + 1e-6), grid))


@pytest.mark.parametrize("seed", range(3))
def test_the_references_folded_weights_are_these(seed: int) -> None:
    q = NVFP4.quantize(dense(2, 96, 160, seed=seed))
    m = MXFP4.quantize(dense(2, 96, 160, seed=seed))
    for packed, checkpoint in ((FP8FromNVFP4.pack(q, True), q), (FP8FromMXFP4.pack(m, True), m)):
        found = packed.dequantize()
        for e in range(2):
            torch.testing.assert_close(reference.fold_e4m3(checkpoint.expert(e)), found[e], rtol=1e-6, atol=0)


def test_words_come_back() -> None:
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    assert torch.equal(fp8_layout._from_words(fp8_layout._to_words(codes)), codes)


def test_the_kernels_table_is_the_product_rounded_to_e4m3() -> None:
    """device.fp8._table in integers: from a scale's byte, the bytes of its eight products with e2m1."""
    first = int(torch.tensor(SMALLEST).to(torch.float8_e4m3fn).view(torch.uint8))
    last = int(torch.tensor(LARGEST).to(torch.float8_e4m3fn).view(torch.uint8))
    for byte in range(first, last + 1):
        scale = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        wanted = (scale * HALVES / 2).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
        more = byte + 4 + ((0x3E >> (byte & 7)) & 1)
        pair = byte + more * 256
        low, high = (pair * 65536 + byte * 256 - 2048) & 0xFFFFFFFF, (pair * 65537 + 0x10100808) & 0xFFFFFFFF
        assert [(word >> 8 * i) & 255 for word in (low, high) for i in range(4)] == wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mxfp4_keeps_powers_of_two_that_32_columns_share_as_the_kernels_tables_want_it(seed: int) -> None:
    """A scale is one byte, without a mantissa; fp8_cuda.cu's two sums give its products with e2m1."""
    gen = torch.Generator().manual_seed(seed)
    packed = FP8FromMXFP4.pack(of_any_scales(1, torch.ones(1), True, gen), False)
    assert packed.scales.shape[-1] * packed.scales.itemsize == 4  # of 128 columns
    found = packed.scales.flatten().tolist()
    assert all(byte & 7 == 0 for byte in found)
    for byte in set(found):
        scale = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        wanted = (scale * HALVES / 2).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
        low, high = (
            (byte * 0x01010100 + 0x03FFF800) & 0xFFFFFFFF,
            (byte * 0x01010101 + 0x14100C08) & 0xFFFFFFFF,
        )
        assert [(word >> 8 * i) & 255 for word in (low, high) for i in range(4)] == wanted


def test_nan_scales_are_an_error_that_says_so() -> None:
    q = MXFP4(torch.zeros(1, 64, 16, dtype=torch.uint8), torch.full((1, 64, 1), 255, dtype=torch.uint8))
    with pytest.raises(FormatError, match="NaN"):
        FP8FromMXFP4.pack(q, False)


def bits(q: NVFP4 | MXFP4) -> list[torch.Tensor]:
    return [piece.reshape(-1).view(torch.uint8) for piece in q.pieces]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("row_groups", [None, 2])
def test_the_checkpoint_comes_back_bit_for_bit(gated: bool, row_groups: int | None) -> None:
    x = dense(3, 96, 160)
    for q, form in (
        (NVFP4.quantize(x, row_groups=row_groups), FP8FromNVFP4),
        (MXFP4.quantize(x), FP8FromMXFP4),
    ):
        packed = form.pack(q, gated)
        assert all(map(torch.equal, bits(packed.to_checkpoint()), bits(q)))
        assert all(map(torch.equal, bits(packed.expert(1).to_checkpoint()), bits(q.expert(1))))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_what_comes_back_packs_to_the_same_whatever_the_scales(seed: int, mx: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    q = of_any_scales(2, torch.rand(2, 2, generator=gen) + 1e-3, mx, gen)
    once = (FP8FromMXFP4 if mx else FP8FromNVFP4).pack(q, True)
    again = type(once).pack(once.to_checkpoint(), True)
    assert torch.equal(once.dequantize(torch.float64), again.dequantize(torch.float64))


@pytest.mark.parametrize("gated", [True, False])
def test_fp8_blocks_keep_their_values(gated: bool) -> None:
    q = FP8Block.quantize(dense(2, 256, 160))
    packed = TritonE4M3.pack(q, gated)
    assert packed.shape == q.shape
    assert packed.expert(1).shape == q.expert(1).shape
    assert torch.equal(packed.dequantize(), q.dequantize(torch.float32))
    assert torch.equal(packed.to_checkpoint().data.view(torch.uint8), q.data.view(torch.uint8))


FP8_CHECKPOINTS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp8_block": FP8Block}


@pytest.mark.parametrize(("fmt", "form"), PACKED_FP8.items())
def test_a_layer_holds_experts_in_the_layout_that_it_packed(fmt: str, form: type[Packed]) -> None:
    quantize = FP8_CHECKPOINTS[fmt].quantize
    checkpoint = ExpertWeights(quantize(dense(3, 256, 128)), quantize(dense(3, 128, 128)))
    packed = checkpoint.with_tensors(form.pack(checkpoint.gate_up, True), form.pack(checkpoint.down, False))
    sizes = ("num_experts", "hidden_size", "intermediate_size", "format")
    assert [getattr(packed, name) for name in sizes] == [getattr(checkpoint, name) for name in sizes]
    assert packed.layout == form.layout

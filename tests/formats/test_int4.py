"""INT4 in groups: every value is the nearest code's, zero points and scales as stored, and errors for what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats import INT4

SCALES = (torch.bfloat16, torch.float16, torch.float32)


def values(q: INT4) -> torch.Tensor:
    """float64, code by code: independent of dequantize."""
    codes = torch.stack([q.packed & 15, q.packed >> 4], -1).flatten(-2).double()
    zero = torch.full_like(q.scale, 8, dtype=torch.float64) if q.symmetric else q.zero.double()
    wide = [t.repeat_interleave(q.group, -1) for t in (zero, q.scale.double())]
    return (codes - wide[0]) * wide[1]


@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([32, 64, 96, 128]),
    st.booleans(),
    st.sampled_from(SCALES),
    st.floats(-8, 8),
)
@settings(max_examples=60, deadline=None)
def test_no_value_is_off_by_more_than_its_group_allows(
    seed: int, rows: int, groups: int, group: int, symmetric: bool, dtype: torch.dtype, exponent: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, groups * group, generator=g) * 2.0**exponent
    q = INT4.quantize(dense, group, symmetric=symmetric, dtype=dtype)
    assert (q.shape, q.group, q.symmetric, q.scale.dtype) == (tuple(dense.shape), group, symmetric, dtype)
    assert torch.equal(q.dequantize(torch.float64), values(q))
    assert torch.equal(q.dequantize(torch.float32).double(), values(q).float().double())
    step = q.scale.double().repeat_interleave(group, -1)
    # half a step; at the ends of the range another half (7.5 steps are cut to 7), and what the scale was rounded by
    assert bool(((values(q) - dense.double()).abs() <= 1.1 * step).all())
    inner = dense.double().abs() <= 7 * step if symmetric else torch.zeros_like(dense, dtype=torch.bool)
    assert bool(((values(q) - dense.double()).abs()[inner] <= 0.5001 * step[inner]).all())


@given(st.integers(0, 2**31 - 1), st.booleans(), st.sampled_from(SCALES))
@settings(max_examples=30, deadline=None)
def test_any_codes_scales_and_zero_points_are_kept(seed: int, symmetric: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (2, 7, 48), dtype=torch.uint8, generator=g)
    scale = torch.rand(2, 7, 3, generator=g).to(dtype)
    zero = None if symmetric else torch.randint(0, 17, (2, 7, 3), dtype=torch.uint8, generator=g)
    q = INT4.of(packed, scale, zero)
    for out in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        exact = values(q)
        want = exact if out == torch.float64 else exact.float().to(out)
        assert torch.equal(q.dequantize(out), want)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_constants_and_one_sided_groups(symmetric: bool) -> None:
    dense = torch.stack([torch.zeros(64), torch.full((64,), 3.0), torch.linspace(1, 2, 64)])
    q = INT4.quantize(dense, symmetric=symmetric)
    assert torch.equal(q.dequantize()[0], torch.zeros(64))
    assert bool((q.dequantize() - dense).abs().max() < 0.25)
    assert bool((q.scale > 0).all())


def wrong(**change: Any) -> dict[str, Any]:
    pieces = {
        "packed": torch.zeros(4, 32, dtype=torch.uint8),
        "scale": torch.ones(4, 2, dtype=torch.bfloat16),
        "zero": torch.zeros(4, 0, dtype=torch.uint8),
    }
    return {**pieces, **change}


@pytest.mark.parametrize(
    ("pieces", "error", "words"),
    [
        (wrong(packed=torch.zeros(4, 32, dtype=torch.int8)), DTypeError, "packed must be uint8"),
        (wrong(scale=torch.ones(4, 2, dtype=torch.float64)), DTypeError, "scale must be bfloat16 or"),
        (wrong(scale=torch.ones(3, 2)), ShapeError, r"scale must have shape \[4, 2\]"),
        (wrong(scale=torch.ones(4, 3)), ShapeError, "G a multiple of 32 that divides C=64"),
        (wrong(scale=torch.ones(4, 4)), ShapeError, "G a multiple of 32 that divides C=64"),
        (wrong(zero=torch.zeros(4, 1, dtype=torch.uint8)), ShapeError, r"zero must have shape \[4, 2\]"),
        (wrong(zero=torch.zeros(4, 2)), DTypeError, "zero must be uint8"),
    ],
)
def test_pieces_that_do_not_fit_are_named(pieces: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        INT4(**pieces)


def test_what_cannot_be_quantised_is_refused() -> None:
    dense = torch.ones(4, 64)
    for group in (0, 16, 48):
        with pytest.raises(ShapeError, match="multiple of 32"):
            INT4.quantize(dense, group)
    with pytest.raises(ShapeError, match="divisible by 128"):
        INT4.quantize(dense, 128)
    with pytest.raises(FormatError, match="float16"):
        INT4.quantize(1e6 * dense, dtype=torch.float16)
    with pytest.raises(FormatError, match=r"w\.scale must be finite"):
        INT4(**wrong(scale=torch.full((4, 2), -1.0))).check_scales("w")
    with pytest.raises(FormatError, match=r"w\.zero must be at most 16, got 17"):
        INT4(**wrong(zero=torch.full((4, 2), 17, dtype=torch.uint8))).check_scales("w")
    for odd in (32.0, "32", True):
        with pytest.raises(ShapeError, match="group must be an integer"):
            INT4.quantize(dense, odd)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_at_the_end_of_float32_stay_finite_or_are_refused(symmetric: bool, dtype: torch.dtype) -> None:
    most = torch.finfo(torch.float32).max
    for first, last in ((-1.0, 1.0), (1.0, 1.0), (-1.0, 0.0), (-1.0, -1.0)):
        dense = 0.87 * most * torch.linspace(first, last, 64).expand(4, 64)
        found = INT4.quantize(dense, symmetric=symmetric, dtype=dtype).dequantize()
        assert bool(found.isfinite().all())
        assert float(((found.double() - dense.double()) / most).abs().max()) < 0.13
    with pytest.raises(FormatError, match=r"values up to 2\.977\d*e\+38, got 3\.0"):
        INT4.quantize(0.9 * dense / 0.87, symmetric=symmetric, dtype=dtype)

"""The 4-bit codes: rounding, packing and reading them, against tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plain_formats import E2M1, from_nibbles, nearest

from moestro.formats import e2m1

TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}  # halfway between two codes: the even one


@pytest.mark.parametrize("sign", [1, -1])
def test_halfway_rounds_to_the_even_code_and_a_hair_beside_it_to_the_nearer(sign: int) -> None:
    for tie, even in TIES.items():
        x = torch.tensor([np.nextafter(np.float32(tie), np.float32(t)) for t in (0, tie, 9)])
        below = int(np.searchsorted(E2M1, tie)) - 1
        assert e2m1.encode(sign * x).tolist() == [
            c + (8 if sign < 0 else 0) for c in (below, even, below + 1)
        ]


def test_beyond_six_saturates_and_zero_keeps_its_sign() -> None:
    x = torch.tensor([6.0, 6.5, 7.0, 1e30, torch.inf, -torch.inf, 0.0, -0.0, -1e-30])
    assert e2m1.encode(x).tolist() == [7, 7, 7, 7, 7, 15, 0, 8, 8]


@given(hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-8, 8, width=32)))
def test_codes_are_the_nearest_values(x: np.ndarray) -> None:
    codes = e2m1.encode(torch.tensor(x)).numpy()
    np.testing.assert_array_equal(nearest(x, E2M1), codes % 8)
    np.testing.assert_array_equal(np.signbit(x), codes >= 8)


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_packing_round_trips(rows: int, pairs: int, random) -> None:
    codes = torch.tensor(
        [[random.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)], dtype=torch.uint8
    )
    packed = e2m1.pack(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(codes, e2m1.unpack(packed))


def test_the_even_column_is_the_low_nibble() -> None:
    assert e2m1.pack(torch.tensor([[0x1, 0xF]], dtype=torch.uint8)).tolist() == [[0xF1]]


def test_every_byte_decodes_to_its_two_values() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(from_nibbles(packed)).float()
    assert torch.equal(expected, e2m1.decode(packed))
    assert torch.equal(expected, e2m1.decode_half(packed).float() * 2.0**14)
    assert torch.equal(
        torch.signbit(expected) | (expected == 0), torch.signbit(e2m1.decode(packed)) | (expected == 0)
    )

"""The inline PTX that decodes weights on a GPU, evaluated here: the interpreter runs other operations in its place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gluon_machine import Code, Program
from gluon_values import Tensor
from packed_cases import every_checkpoint

from moestro.kernels.triton.device import decode
from moestro.kernels.triton.layout import Packed
from moestro.kernels.triton.words import pad, row_order

EXACT = ("nvfp4", "mxfp4", "mxfp8")


def decoded(packed: Packed) -> torch.Tensor:
    """float64 [E, Rp, Cp] in kernel order: what the four planes of every word give, times the row's scale."""
    planes = Code(Program(0, 1, random.Random(0)), {}).of(decode.planes)
    rows = packed.scales.repeat_interleave(packed.SCALE_ROWS, -1)
    found = planes(Tensor(packed.words.reshape(-1, 16)), Tensor(rows.reshape(-1, 1)), packed.CODE)
    shape = packed.words.shape  # [E, Rb, Cb, 64, 16]
    values = torch.stack([plane.data for plane in found], 1).view(*shape[:-1], 4, 16).flatten(-2)
    return values.transpose(2, 3).flatten(1, 2).flatten(2).double() * packed.row_scale.double().unsqueeze(-1)


def in_kernel_order(q: Any, packed: Packed) -> torch.Tensor:
    dense = q.dequantize(torch.float64)
    order = row_order(packed.rows, packed.gated, torch.device("cpu"))
    return torch.stack([pad(matrix, order, packed.words.shape[2] * 64) for matrix in dense])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fmt", every_checkpoint())
def test_every_code_under_every_scale_decodes_to_its_value(fmt: str, gated: bool) -> None:
    """Subnormal codes and scales included; FP8 blocks, whose scales are no bfloat16, are rounded to one once."""
    q, form = every_checkpoint()[fmt]
    packed = form.pack(q, gated)
    found, expected = decoded(packed), in_kernel_order(q, packed)
    if fmt in EXACT:
        assert torch.equal(found, expected)
    else:
        nearest = (expected / packed.row_scale.double().unsqueeze(-1)).nan_to_num().bfloat16().double()
        nearest *= packed.row_scale.double().unsqueeze(-1)
        assert float((found != nearest).double().mean()) < 1e-3
        assert bool(((found - expected).abs() <= expected.abs() * 2.0**-7.99).all())

"""Rows of pairs whose experts are of other ranks: what quantises the intermediate leaves them as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import TACTICS, inputs_of, make

from moestro.kernels.triton.device import fp8, quantize
from moestro.kernels.triton.device.fp8 import quantize_fp8
from moestro.kernels.triton.device.quantize import quantize_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")

OFFSET, LOCAL = 2, 3
IDS = torch.tensor([[2, 0], [4, 3], [5, -7], [9, 2]], dtype=torch.int32)
ORDER = torch.tensor(
    [3, 7, 0, 2, 5, 1, 4, 6], dtype=torch.int32
)  # any: rows, not experts, tell where a pair is
COLUMNS = 144
POISON = 0x7F


def written(kernel: str, foreign: bool, by_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes of rows, scales) that a kernel leaves of eight rows of pairs; poison where it wrote nothing."""
    x = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(1))
    scales = torch.full((8,), torch.nan)
    if kernel == "fp8":
        data = torch.full((8, COLUMNS), POISON, dtype=torch.uint8).view(torch.float8_e4m3fn)
        how: Any = fp8.Recipe(
            False, False, 2, OFFSET, LOCAL, 256, whole=True, foreign=foreign, sorted=by_place
        )
        quantize_fp8[(8,)](x, IDS, ORDER, data, scales, COLUMNS, HOW=how, PDL=False)
        return data.view(torch.uint8), scales
    values = torch.full((8, COLUMNS * 2), POISON, dtype=torch.uint8).view(torch.bfloat16)
    how = quantize.Recipe(2, OFFSET, LOCAL, quantize.DYNAMIC.value, False, by_place, False, 256, foreign)
    quantize_rows[(8,)](x, ORDER, IDS, None, values, None, scales, 8, COLUMNS, HOW=how, PDL=False)
    return values.view(torch.uint8), scales


@pytest.mark.parametrize("kernel", ["fp8", "nvfp4"])
@pytest.mark.parametrize("by_place", [True, False])
def test_rows_of_other_ranks_pairs_are_not_written_and_all_others_are(kernel: str, by_place: bool) -> None:
    rows, scales = written(kernel, True, by_place)
    all_rows, all_scales = written(kernel, False, by_place)
    e = IDS.flatten()[ORDER.long()] if by_place else IDS.flatten()
    here = (e >= OFFSET) & (e < OFFSET + LOCAL)
    assert 0 < int(here.sum()) < 8
    assert torch.equal(rows[here], all_rows[here])
    assert torch.equal(scales[here], all_scales[here])
    assert bool((rows[~here] == POISON).all())
    assert bool(scales[~here].isnan().all())
    assert not bool((all_rows == POISON).all(1).any())


@pytest.mark.parametrize("name", ["few", "sorted"])
@pytest.mark.parametrize("foreign", [0, 1])
def test_only_rows_of_pairs_are_left_out_and_only_where_there_are_other_ranks(
    name: str, foreign: int
) -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4", input_format="nvfp4", foreign=foreign)
    plan = runner.plan(inputs_of(runner, 6), TACTICS[name])
    x, act = (launch.meta["HOW"] for launch in plan if launch.kernel.__name__ == "quantize_rows")
    assert not x.foreign
    assert act.foreign == bool(foreign)
    assert act.sorted == (name == "sorted")

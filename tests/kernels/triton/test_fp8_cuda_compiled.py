"""FP8 products in CUDA C++ through NVRTC, where there is one: no registers spilled, no products that ptxas waits between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.device.arguments import Product, Size
from moestro.kernels.triton.paths import fp8_cuda as path
from moestro.kernels.triton.paths.fp8_cuda import Grid
from moestro.kernels.triton.tactic import Tactic

pytestmark = pytest.mark.skipif(nvrtc.why_missing() is not None, reason=str(nvrtc.why_missing()))

SHAPES = {"deepseek": (7168, 2048), "gpt-oss": (2880, 2880), "qwen3": (2048, 768), "mixtral": (4096, 14336)}


def complaints(log: str) -> list[str]:
    """C7510 to C7519: ptxas waits after each wgmma; a stack or spills: a tile has too many registers."""
    spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    bad = [f"spills {spilled}"] if not spilled or any(spilled) else []
    return bad + re.findall(r".*C75\d\d.*", log)


def variants(tactic: Tactic, powers: bool, hidden: int, inter: int) -> Iterator[tuple[Product, Grid, Size]]:
    """Both products of a layer, gpt-oss's with biases and clamps, as launches have them."""
    biases = hidden == inter
    for stage, rows, columns in ((1, 2 * inter, hidden), (2, hidden, inter)):
        tile, pairs = tactic.of_stage(stage)
        how = Product(stage, 0, 1, 32, True, stage == 1, 0, 1.702 if biases else 1.0, 7.0 if biases else None,
                      1.0 if biases else 0.0, False, False, 1)  # fmt: skip
        grid = Grid(tile.rows, pairs, tile.stages, tactic.raster_group, stage == 1 and path.gathers(tactic), powers,
                    torch.bfloat16 if biases else None)  # fmt: skip
        yield how, grid, Size(rows, columns, rows // 2 if stage == 1 else rows, 0, 32, 8)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_no_product_spills_or_waits(shape: str) -> None:
    wanted = [
        v
        for tile in path.TABLE["fp8"]
        for powers in (False, True)
        for v in variants(tile, powers, *SHAPES[shape])
    ]

    def of(one: tuple[Product, Grid, Size]) -> list[str]:
        how, grid, size = one
        log = path.PRODUCT.cubin(HOW=how, TILE=grid, SIZE=size).log
        return [f"product {how.stage}, {grid}: {what}" for what in complaints(log)]

    with ThreadPoolExecutor(2) as pool:
        assert [bad for found in pool.map(of, wanted) for bad in found] == []

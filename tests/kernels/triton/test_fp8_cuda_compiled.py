"""FP8 products in CUDA C++ through NVRTC, where there is one: no registers spilled, no products that ptxas waits between,
none whose operands are written while it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from inflight import disassemble, overwritten

from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.device.arguments import Product, Size
from moestro.kernels.triton.paths import fp8_cuda as path
from moestro.kernels.triton.paths.fp8_cuda import Grid
from moestro.kernels.triton.tactic import Tactic

pytestmark = pytest.mark.skipif(nvrtc.why_missing() is not None, reason=str(nvrtc.why_missing()))

SHAPES = {"deepseek": (7168, 2048), "gpt-oss": (2880, 2880), "qwen3": (2048, 768), "mixtral": (4096, 14336)}
IN_TWOS = (
    1280,
    1792,
)  # blocks of columns that spans of two alone divide; two registers of one tile are spilled there


def complaints(log: str, most: int = 0) -> list[str]:
    """C7510 to C7519: ptxas waits after each wgmma; a stack or spills: a tile has too many registers."""
    spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    bad = [f"spills {spilled}"] if not spilled or max(spilled) > most else []
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


@pytest.mark.parametrize(("shape", "most"), [*((s, 0) for s in SHAPES.values()), (IN_TWOS, 8)], ids=str)
def test_no_product_spills_or_waits(shape: tuple[int, int], most: int) -> None:
    wanted = [
        v for tile in path.TABLE["fp8"] for powers in (False, True) for v in variants(tile, powers, *shape)
    ]

    def of(one: tuple[Product, Grid, Size]) -> list[str]:
        how, grid, size = one
        log = path.PRODUCT.cubin(HOW=how, TILE=grid, SIZE=size).log
        return [f"product {how.stage}, {grid}: {what}" for what in complaints(log, most)]

    with ThreadPoolExecutor(2) as pool:
        assert [bad for found in pool.map(of, wanted) for bad in found] == []


@pytest.mark.parametrize("size", [(16, 128), (80, 256), (160, 128)], ids=str)
def test_no_instruction_writes_a_register_that_a_running_product_reads(
    size: tuple[int, int], tmp_path: Path
) -> None:
    tile = next(t for t in path.TABLE["fp8"] if (t.pairs1, t.gemm1.rows) == size)
    for how, grid, sizes in variants(tile, False, *SHAPES["gpt-oss"]):
        cubin = path.PRODUCT.cubin(HOW=how, TILE=grid, SIZE=sizes)
        code = disassemble(cubin.image, tmp_path / f"{how.stage}.cubin")
        assert sum(bool(i.a) for i in code.values()) >= 16
        assert overwritten(code) == []

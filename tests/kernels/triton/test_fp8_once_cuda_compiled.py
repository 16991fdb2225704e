"""FP8 blocks in CUDA C++ through NVRTC, where there is one: see test_fp8_cuda_compiled.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from inflight import disassemble
from test_fp8_cuda_compiled import complaints

from moestro.kernels.activations import Code
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.device.arguments import Product, Size
from moestro.kernels.triton.paths import fp8_once_cuda as path
from moestro.kernels.triton.paths.fp8_once_cuda import Grid

pytestmark = pytest.mark.skipif(nvrtc.why_missing() is not None, reason=str(nvrtc.why_missing()))

SHAPES = {"deepseek": (7168, 2048), "qwen3": (2048, 768), "mixtral": (4096, 14336)}
LEFT = {"5 blocks": (640, 640), "7 and 10": (896, 1280), "13 and 11": (1664, 1408)}  # out of whole rounds


def variants(tile: tuple[int, int], hidden: int, inter: int) -> Iterator[tuple[Product, Grid, Size]]:
    """Both products of a layer, with a gate or biases and none."""
    for gated, bias in ((True, None), (False, torch.bfloat16)):
        act = (Code.SWIGLU if gated else Code.RELU2).value
        for stage, rows, columns in ((1, (1 + gated) * inter, hidden), (2, hidden, inter)):
            how = Product(stage, 0, 1, 8, True, gated and stage == 1, act, 1.0, None, 0.0, False, False, 1)
            out_stride = inter if stage == 1 else hidden
            stages = path.stages_for(path.STAGES, columns)
            yield how, Grid(*tile, stages, 8, bias), Size(rows, columns, out_stride, 0, 32, 8)


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LEFT.values()], ids=str)
def test_no_product_spills_or_waits(shape: tuple[int, int]) -> None:
    wanted = [one for tile in path.CLUSTERS for one in variants(tile, *shape)]

    def of(one: tuple[Product, Grid, Size]) -> list[str]:
        how, grid, size = one
        log = path.PRODUCT.cubin(HOW=how, TILE=grid, SIZE=size).log
        return [f"product {how.stage}, {grid}: {what}" for what in complaints(log)]

    with ThreadPoolExecutor(2) as pool:
        assert [bad for found in pool.map(of, wanted) for bad in found] == []


@pytest.mark.parametrize("tile", path.CLUSTERS, ids=str)
def test_between_products_of_a_stage_are_additions_alone(tile: tuple[int, int], tmp_path: Path) -> None:
    """Of a group: from where the first one's results are there to where the second is issued."""
    for how, grid, size in variants(tile, *SHAPES["qwen3"]):
        cubin = path.PRODUCT.cubin(HOW=how, TILE=grid, SIZE=size)
        code = list(disassemble(cubin.image, tmp_path / f"{how.stage}.cubin").values())
        products = [i for i, one in enumerate(code) if one.text.startswith("QGMMA")]
        # a group's stages, of both halves of the rows, and those of any group, of one half
        assert len(products) == 8 * path.GROUPS * grid.stages + 4
        between = [code[a:b] for a, b in zip(products[3::4], products[4::4], strict=False)]
        words = [[one.text.split()[0] for one in part] for part in between]
        alone = [
            part
            for part in words
            if not any(word.startswith(("R2UR", "SYNCS", "LDS", "S2R")) for word in part)
        ]
        assert [part.count("FFMA") for part in alone] == [path.HALF // 2] * (path.GROUPS * grid.stages)

"""Quantised weights that repacking is tested on: every code, under scales of every kind."""

from __future__ import annotations

from typing import Any

import torch

from moestro.formats import INT4, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.kernels.triton.layout import PACKED


def every_code(shape: tuple[int, int, int], seed: int = 0) -> NVFP4:
    """Random codes under random non-zero scales, subnormal ones and the largest included."""
    gen = torch.Generator().manual_seed(seed)
    e, r, c = shape
    packed = torch.randint(0, 256, (e, r, c // 2), dtype=torch.uint8, generator=gen)
    scale = torch.randint(1, 127, (e, r, c // 16), dtype=torch.uint8, generator=gen)
    groups = torch.rand(e, 2, generator=gen) + 0.5
    return NVFP4(packed, scale.view(torch.float8_e4m3fn), groups)


def every_checkpoint() -> dict[str, tuple[Any, Any]]:
    """format -> (checkpoint weights [2, 144, 224] with every code and scales far apart, its packed class)."""
    gen = torch.Generator().manual_seed(3)
    shape = (2, 144, 224)
    nibbles = torch.randint(0, 256, (2, 144, 112), dtype=torch.uint8, generator=gen)
    e8m0 = torch.randint(70, 180, (2, 144, 7), dtype=torch.uint8, generator=gen)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)
    data = torch.where(data & 127 == 127, 0, data).view(torch.float8_e4m3fn)
    blocks = torch.rand(2, 2, 2, generator=gen) * 2.0 ** torch.randint(-20, 20, (2, 2, 2), generator=gen)
    scale = (torch.rand(2, 144, 7, generator=gen) + 0.1).bfloat16()
    zero = torch.randint(0, 17, (2, 144, 7), dtype=torch.uint8, generator=gen)
    found: dict[str, Any] = {
        "int4": INT4.of(nibbles, scale, zero),
        "nvfp4": every_code(shape),
        "mxfp4": MXFP4(nibbles, e8m0),
        "mxfp8": MXFP8(data, e8m0),
        "fp8_block": FP8Block(data, blocks),
    }
    return {fmt: (q, PACKED[fmt]) for fmt, q in found.items()}

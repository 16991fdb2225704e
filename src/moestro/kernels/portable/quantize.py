"""Activations through an input format and back: what docs/numerics.md defines, on whole tensors of rows.

Every step is elementwise or a maximum over a row's own columns: a row's values depend on that row alone.
"""

from __future__ import annotations

import torch

from moestro.formats import NVFP4
from moestro.kernels.problem import MoeProblem

LARGEST = {"fp8": 448.0, "int8": 127.0}  # e4m3's, and int8's without -128
INT8_COLUMNS = 32  # that share a scale
FP8_BLOCK_COLUMNS = (
    128  # the same of "fp8" with fp8_block weights: DeepSeek-V3's recipe (arXiv 2412.19437 §3.3)
)
MIN_SCALE = torch.finfo(torch.float32).tiny


def through(problem: MoeProblem, rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Rows [..., C] quantised to the problem's input format and back, in float32.

    `scale` is the calibrated global scale of NVFP4, broadcast over [...]; None: dynamic, per row. The other formats'
    scales are always dynamic.
    """
    if problem.input_format == "nvfp4":
        if scale is not None:
            scale = scale.broadcast_to(rows.shape[:-1]).reshape(-1)
        return NVFP4.quantize_rows(rows.reshape(-1, rows.shape[-1]), scale).dequantize().view(rows.shape)
    assert problem.input_format is not None
    columns = rows.shape[-1]
    if problem.input_format == "int8":
        return _in_blocks(rows, problem.input_format, min(INT8_COLUMNS, columns))
    blocked = problem.weight_format == "fp8_block"
    return _in_blocks(rows, problem.input_format, min(FP8_BLOCK_COLUMNS, columns) if blocked else columns)


def _in_blocks(rows: torch.Tensor, kind: str, width: int) -> torch.Tensor:
    """Rows of which each `width` columns share a scale, amax / the format's largest; the last ones may be fewer."""
    values = rows.float()
    if not values.numel():
        return values
    over = -values.shape[-1] % width
    if over:
        values = torch.nn.functional.pad(values, (0, over))
    blocks = values.reshape(*values.shape[:-1], -1, width)
    most = LARGEST[kind]
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    # By a tensor: CUDA multiplies by a number's reciprocal, one unit in the last place away.
    scale = (amax / torch.full_like(amax, most)).clamp_(min=MIN_SCALE).masked_fill_(amax == 0, 1.0)
    codes = (blocks / scale).clamp_(-most, most)
    codes = codes.round_() if kind == "int8" else codes.to(torch.float8_e4m3fn).float()
    found = codes.mul_(scale).flatten(-2)
    return found[..., : rows.shape[-1]].contiguous() if over else found

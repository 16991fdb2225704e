"""MXFP8: e4m3 values with a power of two (e8m0) per 32 columns: OCP Microscaling Formats v1.0, §5.

value = e4m3 · 2^(scale - 127). The scale is the smallest power of two that brings a block's maximum to 448 or
below, so that nothing saturates; the specification (§6.3) gives floor(log2(amax)) - 8 as an example, which cuts
maxima above 448 of its units. Checkpoints with e8m0 scales of 32 x 32 blocks (DeepSeek-V4) are MXFP8 too: each
row of a block has the block's scale (`from_blocks`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.formats.checks import (
    require_dense,
    require_dtype,
    require_e8m0_scales,
    require_finite,
    require_mx,
    require_shape,
)
from moestro.formats.mxfp4 import BIAS, decode_e8m0, power_of_two
from moestro.formats.pieces import Pieces, dense_out, in_blocks, join_rows, magnitude, row_chunks

BLOCK = 32
MAX = 448.0  # the largest e4m3, 1.75 · 2^8
# From 2^-126 on, power_of_two gives the scale's reciprocal as a normal float32; 2^119 · 448 still fits float32.
EXPONENTS = (-126, 119)


@dataclass(frozen=True, eq=False)
class MXFP8(Pieces):
    """Values [..., R, C] as MXFP8; C is a multiple of 32.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    data: torch.Tensor  # float8_e4m3fn [..., R, C]
    scale: torch.Tensor  # uint8 [..., R, C/32], e8m0: exponent + 127, 255 is NaN

    format: ClassVar[str] = "mxfp8"
    piece_names: ClassVar[tuple[str, ...]] = ("data", "scale")
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_dtype("data", self.data, torch.float8_e4m3fn)
        require_mx("data", self.data, self.scale, BLOCK)

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError for a block scale that is NaN, naming the expert: once, of what comes from outside."""
        require_e8m0_scales(f"{name}.scale", self.scale, start)

    @classmethod
    def quantize(cls, dense: torch.Tensor) -> Self:
        """Quantise `dense` [..., R, C] of any floating dtype, with little memory beside the result.

        Raises FormatError for infinities and NaN, ShapeError unless C % 32 == 0. Reads the largest magnitude
        back to the host.
        """
        require_dense("dense", dense, BLOCK)
        require_finite("dense", dense, magnitude(dense, (-2, -1)), cls.format)
        *outer, columns = dense.shape
        data = dense.new_empty(dense.shape, dtype=torch.float8_e4m3fn)
        scale = dense.new_empty((*outer, columns // BLOCK), dtype=torch.uint8)
        for x, d, s in row_chunks(dense, data, scale):
            blocks = in_blocks(x.float(), BLOCK)  # [R, C/32, 32]
            exponent = _shared_exponent(magnitude(blocks, (-1,)))
            values = blocks * power_of_two(-exponent).unsqueeze(-1)
            d.copy_(values.clamp_(-MAX, MAX).to(torch.float8_e4m3fn).view(x.shape))
            s.copy_(exponent + BIAS)
        return cls(data, scale)

    @classmethod
    def from_blocks(cls, data: torch.Tensor, scale: torch.Tensor) -> Self:
        """e4m3 [..., R, C] with an e8m0 scale (uint8) per 32 x 32 block, [..., ceil(R/32), C/32]: exact."""
        require_dtype("scale", scale, torch.uint8)
        rows = data.shape[-2]
        require_shape(
            "scale", scale, (*data.shape[:-2], -(-rows // BLOCK), data.shape[-1] // BLOCK), "one per 32 x 32"
        )
        return cls(data, scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :].contiguous())

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """Tensors [..., R_i, C] to one [..., ΣR_i, C]: gate and up to gate_up."""
        return cls(*map(join_rows, cls._matching(parts, but=-2)))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return tuple(self.data.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """e4m3 · 2^(scale - 127) [..., R, C]: exact in float32, float64 and bf16 within their range."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        out = dense_out(out, self.shape, dtype, self.device)
        for values, data, scale in row_chunks(out, self.data, self.scale):
            work = (
                values if dtype == compute else torch.empty(values.shape, dtype=compute, device=self.device)
            )
            in_blocks(work.copy_(data), BLOCK).mul_(decode_e8m0(scale).to(compute).unsqueeze(-1))
            if work is not values:
                values.copy_(work)
        return out


def _shared_exponent(amax: torch.Tensor) -> torch.Tensor:
    """int32: the least exponent e with amax <= 448 · 2^e, within what scales can be."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction · 2^exponent, fraction in [0.5, 1)
    return (exponent - 9 + (fraction > 7 / 8)).clamp(*EXPONENTS).to(torch.int32)

"""MXFP4: e2m1 codes with a power of two (e8m0) per 32 columns: OCP Microscaling Formats v1.0, §5; gpt-oss'
weights.

value = e2m1 · 2^(scale - 127). The specification leaves the choice of the scale open (§6.3 gives one as an
example, which cuts maxima above 6 of its units down to 6, by up to a quarter). Here, as in
compressed-tensors, it is the smallest power of two that brings a block's maximum below 7, so that no value
is off by more than half a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import ShapeError
from moestro.formats import e2m1
from moestro.formats.buffers import Buffers
from moestro.formats.checks import (
    require_dense,
    require_dtype,
    require_e8m0_scales,
    require_finite,
    require_mx,
)
from moestro.formats.pieces import Pieces, dense_out, in_blocks, join_rows, magnitude, row_chunks

BLOCK = 32
BIAS = 127
NAN_CODE = 255
# 6 · 2^125 is the largest value that fits float32: under 2^126 the code for 4 is infinite already.
EXPONENTS = (-BIAS, 125)


@dataclass(frozen=True, eq=False)
class MXFP4(Pieces):
    """Values [..., R, C] as MXFP4; C is a multiple of 32.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    packed: torch.Tensor  # uint8 [..., R, C/2], low nibble = even column
    scale: torch.Tensor  # uint8 [..., R, C/32], e8m0: exponent + 127, 255 is NaN

    format: ClassVar[str] = "mxfp4"
    piece_names: ClassVar[tuple[str, ...]] = ("packed", "scale")
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_dtype("packed", self.packed, torch.uint8)
        require_mx("packed", self.packed, self.scale, BLOCK, per_item=2)

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError for a block scale that is NaN, naming the expert: once, of what comes from outside."""
        require_e8m0_scales(f"{name}.scale", self.scale, start)

    @classmethod
    def quantize(cls, dense: torch.Tensor) -> Self:
        """Quantise `dense` [..., R, C] of any floating dtype, with little memory beside the result.

        Values from 1.75 · 2^127 saturate at 1.5 · 2^127, the largest that float32 can hold again. Raises
        FormatError for infinities and NaN, ShapeError unless C % 32 == 0. Reads the largest magnitude back to
        the host.
        """
        require_dense("dense", dense, BLOCK)
        require_finite("dense", dense, magnitude(dense, (-2, -1)), cls.format)
        *outer, columns = dense.shape
        packed = dense.new_empty((*outer, columns // 2), dtype=torch.uint8)
        scale = dense.new_empty((*outer, columns // BLOCK), dtype=torch.uint8)
        buffers = Buffers(dense.device)
        for x, p, s in row_chunks(dense, packed, scale):
            blocks = in_blocks(buffers.take("ratio", x.shape, torch.float32).copy_(x), BLOCK)  # [R, C/32, 32]
            exponent = shared_exponent(magnitude(blocks, (-1,)))
            blocks *= power_of_two(-exponent).unsqueeze(-1)
            e2m1.pack(e2m1.encode(blocks, buffers).view(x.shape), out=p)
            s.copy_(exponent + BIAS)
        return cls(packed, scale)

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """Tensors [..., R_i, C] to one [..., ΣR_i, C]: gate and up to gate_up."""
        return cls(*map(join_rows, cls._matching(parts, but=-2)))

    @classmethod
    def from_gpt_oss(cls, blocks: torch.Tensor, scales: torch.Tensor) -> Self:
        """gpt-oss' `*_blocks` uint8 [..., R, C/32, 16] and `*_scales` uint8 [..., R, C/32], without a copy.

        The rows stay in their order: of gate_up_proj, gate and up alternate.
        """
        require_dtype("blocks", blocks, torch.uint8)
        if blocks.ndim < 3 or blocks.shape[-1] != BLOCK // 2:
            raise ShapeError(f"blocks must have shape [..., R, C/32, 16], got {list(blocks.shape)}")
        return cls(blocks.flatten(-2), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """e2m1 · 2^(scale - 127) [..., R, C]: exact in float32, float64 and bf16 within their range."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        out = dense_out(out, self.shape, dtype, self.device)
        buffers = Buffers(self.device)
        for values, packed, scale in row_chunks(out, self.packed, self.scale):
            work = values if dtype == compute else buffers.take("work", values.shape, compute)
            work.copy_(e2m1.decode_half(packed, buffers)).mul_(e2m1.HALF_SHIFT)
            in_blocks(work, BLOCK).mul_(decode_e8m0(scale).to(compute).unsqueeze(-1))
            if work is not values:
                values.copy_(work)
        return out


def shared_exponent(amax: torch.Tensor) -> torch.Tensor:
    """int32: the least exponent e with amax < 7 · 2^e, within what scales can be."""
    fraction, exponent = torch.frexp(amax)  # amax = fraction · 2^exponent, fraction in [0.5, 1)
    return (exponent - 3 + (fraction >= 7 / 8)).clamp(*EXPONENTS).to(torch.int32)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, for int32 exponents from -126 to 127."""
    return ((exponent + BIAS) << 23).view(torch.float32)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """2^(scale - 127) in float32 of uint8; 255 is NaN. 2^-127 is a float32 subnormal."""
    code = scale.to(torch.int32)
    values = power_of_two(code - BIAS)
    values = torch.where(code == 0, 2.0**-BIAS, values)
    return torch.where(code == NAN_CODE, torch.nan, values)

"""INT4 in groups: 4-bit integers with a scale, perhaps a zero point, per G columns: Kimi-K2's weights (compressed-tensors
`pack-quantized`, G = 32, symmetric), AWQ's (arXiv 2306.00978) and GPTQ's (arXiv 2210.17323), mostly G = 128.

value = (code - zero) · scale; symmetric weights have the zero point 8. Nothing is rounded anew on reading: scales stay
in the checkpoint's dtype, and (code - zero) times a bf16 or fp16 scale is exact in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import FormatError, ShapeError, as_count
from moestro.formats.checks import (
    require_dense,
    require_dtype,
    require_finite,
    require_one_device,
    require_scale,
    require_shape,
)
from moestro.formats.pieces import Pieces, dense_out, in_blocks, join_rows, magnitude, row_chunks

BLOCK = 32  # groups are multiples of it
SYMMETRIC = 8  # the zero point of symmetric weights
MOST_ZERO = 16  # GPTQ keeps zero - 1 in 4 bits
SCALES = (torch.bfloat16, torch.float16, torch.float32)
TINY = torch.finfo(torch.float32).tiny
MOST_VALUE = torch.finfo(torch.float32).max * 7 / 8  # a code stands for up to 8 / 7.5 of the largest value


@dataclass(frozen=True, eq=False)
class INT4(Pieces):
    """Values [..., R, C] as INT4 in groups of G columns, a multiple of 32 that divides C.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    packed: torch.Tensor  # uint8 [..., R, C/2], low nibble = even column
    scale: torch.Tensor  # bfloat16, float16 or float32 [..., R, C/G]
    zero: torch.Tensor  # uint8 [..., R, C/G], 0 to 16; [..., R, 0] where all are 8 (symmetric)

    format: ClassVar[str] = "int4"
    piece_names: ClassVar[tuple[str, ...]] = ("packed", "scale", "zero")
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_dtype("packed", self.packed, torch.uint8)
        require_dtype("scale", self.scale, *SCALES)
        require_dtype("zero", self.zero, torch.uint8)
        require_one_device(packed=self.packed, scale=self.scale, zero=self.zero)
        shape = self.packed.shape
        if len(shape) < 2:
            raise ShapeError(f"packed must have shape [..., R, C/2], got {list(shape)}")
        groups = self.scale.shape[-1] if self.scale.ndim else 0
        columns = 2 * shape[-1]
        require_shape("scale", self.scale, (*shape[:-1], groups), "one per group of columns")
        if columns and (not groups or columns % groups or columns // groups % BLOCK):
            raise ShapeError(
                f"scale must have C/G columns, G a multiple of {BLOCK} that divides C={columns}, "
                f"got {list(self.scale.shape)}"
            )
        if self.zero.shape[-1:] != (0,):
            require_shape("zero", self.zero, tuple(self.scale.shape), "as scale, or no columns: symmetric")
        else:
            require_shape("zero", self.zero, (*shape[:-1], 0), "no columns: symmetric")

    @classmethod
    def of(cls, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> Self:
        """From its pieces, symmetric without a zero point."""
        return cls(packed, scale, packed.new_empty((*packed.shape[:-1], 0)) if zero is None else zero)

    @classmethod
    def quantize(
        cls,
        dense: torch.Tensor,
        group: int = BLOCK,
        *,
        symmetric: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Quantise `dense` [..., R, C] of any floating dtype, with little memory beside the result.

        Symmetric: scale = amax / 7.5, as compressed-tensors; otherwise (max - min) / 15, 0 among the values, and the
        zero point that is nearest. Codes are the nearest under the scale as rounded to `dtype`; a scale that rounds to 0
        is the smallest that does not. Raises FormatError for infinities, NaN and scales beyond `dtype`, ShapeError
        unless the group is a multiple of 32 that divides C. Reads the largest magnitude back to the host.
        """
        group = as_count("group", group, ShapeError, least=None)
        if group < BLOCK or group % BLOCK:
            raise ShapeError(f"group must be a multiple of {BLOCK} columns, got {group}")
        require_dense("dense", dense, group)
        require_dtype("scale", torch.empty(0, dtype=dtype), *SCALES)
        amax = magnitude(dense, (-2, -1))
        require_finite("dense", dense, amax, cls.format)
        most = min(7.5 * torch.finfo(dtype).max, MOST_VALUE)
        if amax.numel() and float(amax.max()) > most:
            raise FormatError(
                f"dense must have a scale within {dtype} and codes within float32 for int4, so values up to {most:g}, "
                f"got {float(amax.max()):g}"
            )
        *outer, columns = dense.shape
        packed = dense.new_empty((*outer, columns // 2), dtype=torch.uint8)
        scale = dense.new_empty((*outer, columns // group), dtype=dtype)
        zero = dense.new_empty((*outer, 0 if symmetric else columns // group), dtype=torch.uint8)
        for x, p, s, z in row_chunks(dense, packed, scale, zero):
            codes = _quantize_chunk(in_blocks(x.float(), group), s, z).view(x.shape)
            torch.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4, out=p)
        return cls(packed, scale, zero)

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """Tensors [..., R_i, C] to one [..., ΣR_i, C]: gate and up to gate_up."""
        return cls(*map(join_rows, cls._matching(parts, but=-2)))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    @property
    def group(self) -> int:
        """G, columns under one scale."""
        return self.shape[-1] // max(1, self.scale.shape[-1])

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points: all are 8."""
        return self.zero.shape[-1] == 0

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError for a scale that is negative or not finite, naming the expert, or a zero point beyond 16."""
        require_scale(f"{name}.scale", self.scale, zero=True, start=start)
        if not self.zero.numel() or self.zero.is_meta or torch.compiler.is_compiling():
            return
        if (most := int(self.zero.max())) > MOST_ZERO:
            raise FormatError(f"{name}.zero must be at most {MOST_ZERO}, got {most}")

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """(code - zero) · scale [..., R, C], in float32 (or float64) and then rounded to dtype."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        out = dense_out(out, self.shape, dtype, self.device)
        for values, packed, scale, zero in row_chunks(out, self.packed, self.scale, self.zero):
            work = values if dtype == compute else values.new_empty(values.shape, dtype=compute)
            work[:, 0::2], work[:, 1::2] = packed & 15, packed >> 4
            groups = in_blocks(work, self.group)
            groups -= zero.to(compute).unsqueeze(-1) if zero.shape[-1] else float(SYMMETRIC)
            groups *= scale.to(compute).unsqueeze(-1)
            if work is not values:
                values.copy_(work)
        return out


def _quantize_chunk(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of groups [R, C/G, G]; writes their scale, and their zero point if it has columns."""
    if zero.shape[-1]:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        step = (high / 2 - low / 2) / 7.5  # their difference may be beyond float32
    else:
        low, step = None, magnitude(groups, (-1,)) / 7.5
    step = torch.where(step == 0, 1.0, step.clamp(min=_smallest(scale.dtype)))
    scale.copy_(step)
    units = groups / scale.float().unsqueeze(-1)
    if low is None:
        return units.round_().clamp_(-8, 7).add_(SYMMETRIC).to(torch.uint8)
    zero.copy_((-low / scale.float()).round_().clamp_(0, 15))
    return units.round_().add_(zero.float().unsqueeze(-1)).clamp_(0, 15).to(torch.uint8)


def _smallest(dtype: torch.dtype) -> float:
    """The least scale: normal in float32, so that its reciprocal is finite."""
    return max(TINY, torch.finfo(dtype).smallest_normal)

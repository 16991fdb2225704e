"""NVFP4: e2m1 codes with an e4m3 scale per 16 columns under a float32 global scale.

value = e2m1 · scale · global_scale. Quantising is NVIDIA's two-level recipe ("Introducing NVFP4", 2025; the
layout of ModelOpt and compressed-tensors): global_scale = amax / (6 · 448), scale = block amax / (6 ·
global_scale) rounded to e4m3 with its subnormals, codes = value / (scale · global_scale) rounded to nearest,
ties to even. e2m1 · scale has at most 6 significant bits: exact in bfloat16.

A global scale covers one matrix [R, C] (shape [...], the leading dimensions), or one of G equal groups of its
rows (shape [..., G]): gate and up of a merged projection keep their own (G = 2), activations have one per
token (G = R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import FormatError, ShapeError
from moestro.formats import e2m1
from moestro.formats.base import CHECKPOINT
from moestro.formats.checks import (
    require_dense,
    require_dtype,
    require_finite,
    require_float_dtype,
    require_leading,
    require_one_device,
    require_parts,
    require_shape,
)

BLOCK = 16
SCALE_MAX = 448.0  # the largest e4m3
RANGE = e2m1.MAX * SCALE_MAX  # a global scale of 1 reaches ±2688
MIN_GLOBAL = torch.finfo(torch.float32).tiny  # below, float32 has fewer than 24 bits for the scale itself
CHUNK_ELEMENTS = 1 << 22  # quantised at once: bounds the float32 temporaries to a few of 16 MiB


@dataclass(frozen=True, eq=False)
class NVFP4:
    """Values [..., R, C] as NVFP4; C is a multiple of 16.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    packed: torch.Tensor  # uint8 [..., R, C/2], low nibble = even column
    scale: torch.Tensor  # float8_e4m3fn [..., R, C/16]
    global_scale: torch.Tensor  # float32 [...] or [..., G]

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = CHECKPOINT
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_dtype("packed", self.packed, torch.uint8)
        require_dtype("scale", self.scale, torch.float8_e4m3fn)
        require_dtype("global_scale", self.global_scale, torch.float32)
        require_one_device(packed=self.packed, scale=self.scale, global_scale=self.global_scale)
        if self.packed.ndim < 2 or self.packed.shape[-1] % (BLOCK // 2):
            raise ShapeError(
                f"packed must have shape [..., R, C/2], C divisible by {BLOCK}, got {list(self.packed.shape)}"
            )
        *lead, rows, half = self.packed.shape
        require_shape(
            "scale", self.scale, (*lead, rows, half * 2 // BLOCK), f"one per {BLOCK} columns of packed"
        )
        require_global_scale(self.global_scale, tuple(lead), rows)

    @classmethod
    def quantize(
        cls, dense: torch.Tensor, global_scale: torch.Tensor | None = None, *, row_groups: int | None = None
    ) -> Self:
        """Quantise `dense` [..., R, C], any floating dtype, on its device, with little memory beside the
        result.

        global_scale: float32 [...] or [..., G]; by default amax / 2688 of each matrix (of each of its
        `row_groups` groups of rows), 1 for zeros, at least 2^-126. Under a given one, values beyond
        ±2688·global_scale saturate.

        Raises FormatError for infinities and NaN in `dense`, or a global scale that is not positive and
        finite; ShapeError unless C % 16 == 0. Reads the largest magnitude back to the host.
        """
        require_dense("dense", dense, BLOCK)
        *lead, rows, columns = dense.shape
        amax = group_amax(dense, row_groups)
        require_finite("dense", dense, amax, cls.format)
        if global_scale is None:
            global_scale = dynamic_global_scale(amax)
        else:
            require_dtype("global_scale", global_scale, torch.float32)
            require_one_device(dense=dense, global_scale=global_scale)
            require_global_scale(global_scale, tuple(lead), rows)
            if not bool(((global_scale > 0) & torch.isfinite(global_scale)).all()):
                raise FormatError(
                    f"global_scale must be positive and finite, got {global_scale.flatten()[:8].tolist()}"
                )
        out = cls(
            dense.new_empty((*lead, rows, columns // 2), dtype=torch.uint8),
            dense.new_empty((*lead, rows, columns // BLOCK), dtype=torch.float8_e4m3fn),
            global_scale,
        )
        _quantize_into(out, dense)
        return out

    @classmethod
    def quantize_rows(cls, x: torch.Tensor, global_scale: torch.Tensor | None = None) -> Self:
        """Quantise activations `x` [N, H] under one dynamic global scale per row; global_scale is [N] then.

        With a calibrated global_scale ([] or [N]), values beyond ±2688·global_scale saturate. Never waits for
        the device and runs under torch.compile: a row that holds an infinity or NaN comes out as NaN (under a
        given scale an infinity saturates), it does not raise.
        """
        require_dense("x", x, BLOCK)
        if x.ndim != 2:
            raise ShapeError(f"x must have shape [N, H], got {list(x.shape)}")
        if global_scale is None:
            global_scale = dynamic_global_scale(x.abs().amax(-1))
        require_global_scale(global_scale, (), x.shape[0])
        return cls(*quantize_blocks(x, _per_row(global_scale, (), x.shape[0])), global_scale)

    @classmethod
    def stack(cls, parts: Sequence[NVFP4]) -> Self:
        """E tensors [..., R, C] of the same shape and row groups to one [E, ..., R, C]."""
        pieces = require_parts(parts, lambda p: (p.packed, p.scale, p.global_scale))
        packed, scale, global_scale = (torch.stack(piece) for piece in pieces)
        return cls(packed, scale, global_scale)

    @classmethod
    def cat_rows(cls, parts: Sequence[NVFP4]) -> Self:
        """Tensors [..., R, C] with one global scale per matrix to [..., G·R, C] whose G row groups keep
        theirs.

        `NVFP4.cat_rows([gate, up])` is the gate_up of an expert, or of many.
        """
        pieces = require_parts(parts, lambda p: (p.packed, p.scale, p.global_scale))
        require_shape(
            "parts[0].global_scale", parts[0].global_scale, parts[0].shape[:-2], "one per matrix to merge"
        )
        packed, scale = (torch.cat([piece.view(torch.uint8) for piece in pieces[i]], dim=-2) for i in (0, 1))
        return cls(packed, scale.view(torch.float8_e4m3fn), torch.stack(pieces[2], dim=-1))

    @classmethod
    def from_modelopt(
        cls, weight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_2: torch.Tensor
    ) -> Self:
        """NVIDIA ModelOpt's tensors: weight is packed, and weight_scale_2 [...] or [1] multiplies."""
        return cls(weight, weight_scale, _per_matrix("weight_scale_2", weight_scale_2, weight))

    @classmethod
    def from_compressed_tensors(
        cls, weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_global_scale: torch.Tensor
    ) -> Self:
        """compressed-tensors `nvfp4-pack-quantized`: the same but for weight_global_scale [...] or [1], which
        divides.

        Its reciprocal is rounded to float32: values are within 1 unit in the last place of value /
        weight_global_scale.
        """
        return cls(
            weight_packed,
            weight_scale,
            1 / _per_matrix("weight_global_scale", weight_global_scale, weight_packed),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.global_scale.nbytes

    @property
    def row_groups(self) -> int:
        """G: how many groups of rows have a global scale of their own."""
        return self.global_scale.shape[-1] if self.global_scale.ndim > self.packed.ndim - 2 else 1

    def row_global_scale(self) -> torch.Tensor:
        """The global scale of each row, float32 [..., R, 1], or [..., 1, 1] where all rows share it."""
        return _per_row(self.global_scale, self.shape[:-2], self.shape[-2])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """e2m1 · scale · global_scale [..., R, C], rounded once to float32 (float64 for float64), then to dtype."""
        require_float_dtype(dtype)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        values = in_blocks(e2m1.decode_half(self.packed).to(compute))
        # The power of two that decode_half leaves out goes into the scale: exact, e4m3 · 2^14 fits any float.
        values *= (self.scale.to(compute) * e2m1.HALF_SHIFT).unsqueeze(-1)
        values *= self.row_global_scale().to(compute).unsqueeze(-1)
        return values.reshape(self.shape).to(dtype)

    def expert(self, index: int) -> NVFP4:
        """[..., R, C] at `index` of the first dimension, without a copy."""
        require_leading(self.shape)
        return NVFP4(self.packed[index], self.scale[index], self.global_scale[index])

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.packed.to(device), self.scale.to(device), self.global_scale.to(device))

    def to_checkpoint(self) -> NVFP4:
        return self


def dynamic_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / 2688 in float32, 1 where amax is 0; not below 2^-126, so values under about 2^-133 become zero."""
    scale = (amax.float() / RANGE).clamp(min=MIN_GLOBAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize_blocks(x: torch.Tensor, row_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., R, C] under row_scale [..., R or 1, 1] to (packed [..., R, C/2], scale [..., R, C/16])."""
    blocks = in_blocks(x.float())  # [..., R, C/16, 16]
    amax = blocks.abs().amax(-1)
    scale = (amax / (e2m1.MAX * row_scale)).clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * row_scale
    # A block whose scale rounded to zero divides by infinity: its codes are zero.
    step = torch.where(step == 0, torch.full_like(step, torch.inf), step)
    return e2m1.pack(e2m1.encode(blocks / step.unsqueeze(-1)).flatten(-2)), scale


def group_amax(dense: torch.Tensor, row_groups: int | None) -> torch.Tensor:
    """The largest magnitude of each matrix [...], or of each group of rows [..., G]; 0 where there is no value."""
    *lead, rows, columns = dense.shape
    if row_groups is not None:
        if row_groups < 1 or rows % row_groups:
            raise ShapeError(f"row_groups must divide the {rows} rows of dense, got {row_groups}")
        dense = dense.reshape(*lead, row_groups, rows // row_groups, columns)
    if rows * columns == 0:
        return dense.new_zeros(dense.shape[:-2])
    low, high = dense.amin((-2, -1)), dense.amax((-2, -1))  # no |dense|: that would be a copy of all experts
    return torch.maximum(-low, high).float()


def require_global_scale(global_scale: torch.Tensor, lead: tuple[int, ...], rows: int) -> None:
    """ShapeError unless global_scale is [...] or [..., G] with G dividing the rows."""
    shape = tuple(global_scale.shape)
    if shape == lead:
        return
    groups = shape[-1] if shape else 0
    if shape[:-1] != lead or (rows % groups if groups else rows):
        raise ShapeError(
            f"global_scale must have shape {list(lead)}, or {[*lead, 'G']} with G dividing the {rows} rows, "
            f"got {list(shape)}"
        )


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [..., C/16, 16]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def _quantize_into(out: NVFP4, dense: torch.Tensor) -> None:
    """Fill `out`, a chunk of rows of one matrix at a time."""
    *lead, rows, columns = dense.shape
    row_scale = out.row_global_scale().expand(*lead, rows, 1)
    matrices = zip(
        *(t.reshape(-1, *t.shape[-2:]) for t in (dense, row_scale, out.packed, out.scale)), strict=True
    )
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for x, g, packed, scale in matrices:
        for r in range(0, rows, step):
            at = slice(r, r + step)
            packed[at], scale[at] = quantize_blocks(x[at], g[at])


def _per_row(global_scale: torch.Tensor, lead: tuple[int, ...], rows: int) -> torch.Tensor:
    if global_scale.ndim == len(lead):
        return global_scale[..., None, None]
    groups = global_scale.shape[-1]
    return global_scale.repeat_interleave(rows // groups if groups else 0, dim=-1).unsqueeze(-1)


def _per_matrix(name: str, scale: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A scalar that a checkpoint stores as [...] or [..., 1], as [...]."""
    require_dtype(name, scale, torch.float32)
    lead = packed.shape[:-2]
    return scale.squeeze(-1) if scale.shape == (*lead, 1) else scale

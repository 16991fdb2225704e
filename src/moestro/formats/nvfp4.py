"""NVFP4: e2m1 codes with an e4m3 scale per 16 columns under a float32 global scale.

value = e2m1 · scale · global_scale. Quantising is NVIDIA's two-level recipe ("Introducing NVFP4", 2025; the
layout of ModelOpt and compressed-tensors): global_scale = amax / (6 · 448), scale = block amax / (6 ·
global_scale) rounded to e4m3 with its subnormals, codes = value / (scale · global_scale) rounded to
nearest, ties to even. e2m1 · scale has at most 6 significant bits: exact in bfloat16.

A global scale covers one matrix [R, C] (shape [...], the leading dimensions), or one of G equal groups of
its rows (shape [..., G]): gate and up of a merged projection keep their own (G = 2), activations have one
per token (G = R)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import FormatError, ShapeError
from moestro.formats import e2m1
from moestro.formats.buffers import Buffers
from moestro.formats.checks import (
    require_block_scales,
    require_dense,
    require_dtype,
    require_finite,
    require_one_device,
    require_scale,
    require_shape,
)
from moestro.formats.pieces import (
    QUANTISE_CHUNK,
    Pieces,
    dense_out,
    in_blocks,
    join_rows,
    magnitude,
    row_chunks,
)

BLOCK = 16
SCALE_MAX = 448.0  # the largest e4m3
RANGE = e2m1.MAX * SCALE_MAX  # a global scale of 1 reaches ±2688
MIN_GLOBAL = torch.finfo(torch.float32).tiny  # below 2^-126 float32 has less than 24 bits


@dataclass(frozen=True, eq=False)
class NVFP4(Pieces):
    """Values [..., R, C] as NVFP4; C is a multiple of 16.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    packed: torch.Tensor  # uint8 [..., R, C/2], low nibble = even column
    scale: torch.Tensor  # float8_e4m3fn [..., R, C/16]
    global_scale: torch.Tensor  # float32 [...] or [..., G]

    format: ClassVar[str] = "nvfp4"
    piece_names: ClassVar[tuple[str, ...]] = ("packed", "scale", "global_scale")
    block: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_dtype("packed", self.packed, torch.uint8)
        require_dtype("scale", self.scale, torch.float8_e4m3fn)
        require_dtype("global_scale", self.global_scale, torch.float32)
        require_one_device(packed=self.packed, scale=self.scale, global_scale=self.global_scale)
        shape = self.packed.shape
        if len(shape) < 2 or shape[-1] % (BLOCK // 2):
            raise ShapeError(
                f"packed must have shape [..., R, C/2], C divisible by {BLOCK}, got {list(shape)}"
            )
        require_shape("scale", self.scale, (*shape[:-1], shape[-1] * 2 // BLOCK), f"one per {BLOCK} columns")
        require_global_scale(self.global_scale, tuple(shape[:-2]), shape[-2])

    @classmethod
    def quantize(
        cls, dense: torch.Tensor, global_scale: torch.Tensor | None = None, *, row_groups: int | None = None
    ) -> Self:
        """Quantise `dense` [..., R, C] of any floating dtype, with little memory beside the result.

        global_scale: float32 [...] or [..., G]; by default amax / 2688 of each matrix (of each of its
        `row_groups` groups of rows), 1 for zeros, at least 2^-126. Under a given one, values beyond
        ±2688·global_scale saturate.

        Raises FormatError for infinities and NaN in `dense`, or a global scale that is not positive and
        finite; ShapeError unless C % 16 == 0. Reads the largest magnitude back to the host.
        """
        require_dense("dense", dense, BLOCK)
        amax = group_amax(dense, row_groups)
        require_finite("dense", dense, amax, cls.format)
        if global_scale is None:
            return cls._quantize(dense, dynamic_global_scale(amax))
        if row_groups is not None:
            raise ShapeError(f"row_groups must be left out where global_scale is given, got {row_groups}")
        _check_given(global_scale, dense)
        if not bool(((global_scale > 0) & torch.isfinite(global_scale)).all()):
            some = global_scale.flatten()[:8].tolist()
            raise FormatError(f"global_scale must be positive and finite, got {some}")
        return cls._quantize(dense, global_scale)

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
            return cls._quantize(x, dynamic_global_scale(magnitude(x, (-1,))))
        _check_given(global_scale, x)
        return cls._quantize(x, global_scale)

    @classmethod
    def _quantize(cls, dense: torch.Tensor, global_scale: torch.Tensor) -> Self:
        *outer, columns = dense.shape
        packed = dense.new_empty((*outer, columns // 2), dtype=torch.uint8)
        scale = dense.new_empty((*outer, columns // BLOCK), dtype=torch.float8_e4m3fn)
        out = cls(packed, scale, global_scale)
        row_scale = out.row_global_scale().expand(*outer, 1)
        buffers = Buffers(dense.device)
        for x, g, p, s in row_chunks(dense, row_scale, packed, scale, chunk=QUANTISE_CHUNK):
            _quantize_chunk(x, g, p, s, buffers)
        return out

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """G tensors [..., R, C] with one global scale per matrix to [..., G·R, C], whose row groups keep it.

        `NVFP4.cat_rows([gate, up])` is the gate_up of an expert, or of many.
        """
        packed, scale, global_scale = cls._matching(parts)
        require_shape("parts[0].global_scale", global_scale[0], parts[0].shape[:-2], "one per matrix")
        return cls(join_rows(packed), join_rows(scale), torch.stack(global_scale, dim=-1))

    @classmethod
    def from_modelopt(
        cls, weight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_2: torch.Tensor
    ) -> Self:
        """NVIDIA ModelOpt's tensors: `weight` is packed; float32 weight_scale_2 [...] or [1] multiplies."""
        return cls(weight, weight_scale, _per_matrix("weight_scale_2", weight_scale_2, weight))

    @classmethod
    def from_compressed_tensors(
        cls, weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_global_scale: torch.Tensor
    ) -> Self:
        """The tensors of compressed-tensors `nvfp4-pack-quantized`: weight_global_scale [...] or [1] divides.

        It becomes its reciprocal, rounded to float32: values are within 2 units in the last place.
        """
        divisor = _per_matrix("weight_global_scale", weight_global_scale, weight_packed)
        return cls(weight_packed, weight_scale, 1 / divisor)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError for a global scale that is not positive and finite, or block scales negative or NaN."""
        require_scale(f"{name}.global_scale", self.global_scale, start=start)
        require_block_scales(f"{name}.scale", self.scale, start)

    @property
    def row_groups(self) -> int:
        """G: how many groups of rows have a global scale of their own; 1 where the matrix has one."""
        return self.global_scale.shape[-1] if self.global_scale.ndim > self.packed.ndim - 2 else 1

    def row_global_scale(self) -> torch.Tensor:
        """The global scale of each row: float32 [..., R, 1], or [..., 1, 1] where all rows share it."""
        if self.global_scale.ndim == self.packed.ndim - 2:
            return self.global_scale[..., None, None]
        *lead, groups = self.global_scale.shape
        rows = self.packed.shape[-2]
        per_group = self.global_scale.unsqueeze(-1).expand(*lead, groups, rows // max(1, groups))
        return per_group.reshape(*lead, rows, 1)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """e2m1 · scale · global_scale [..., R, C], rounded to float32 (or float64) and then to dtype.

        Into `out`, where given: fresh memory can cost more than the values.
        """
        return self._dequantize(dtype, self.row_global_scale(), out)

    def dequantize_unscaled(
        self, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e2m1 · scale [..., R, C], without the global scale: exact in every floating dtype.

        For a matrix product over C that is scaled afterwards, by row_global_scale().
        """
        return self._dequantize(dtype, None, out)

    def _dequantize(
        self, dtype: torch.dtype, row_scale: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        out = dense_out(out, self.shape, dtype, self.device)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        factors = () if row_scale is None else (row_scale.to(compute).expand(*self.shape[:-1], 1),)
        buffers = Buffers(self.device)
        for values, packed, scale, *row in row_chunks(out, self.packed, self.scale, *factors):
            work = values if dtype == compute else buffers.take("work", values.shape, compute)
            blocks = in_blocks(work.copy_(e2m1.decode_half(packed, buffers)), BLOCK)
            # The power of two that decode_half leaves out goes into the scale: e4m3 · 2^14 is exact.
            blocks *= (scale.to(compute) * e2m1.HALF_SHIFT).unsqueeze(-1)
            for factor in row:
                blocks *= factor.unsqueeze(-1)
            if work is not values:
                values.copy_(work)
        return out


def dynamic_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / 2688, 1 where amax is 0; not below 2^-126, so that values under about 2^-133 become zero."""
    # By a tensor: CUDA multiplies by a number's reciprocal, one unit in the last place away (H100).
    scale = (amax / torch.full_like(amax, RANGE)).clamp(min=MIN_GLOBAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def _quantize_chunk(
    x: torch.Tensor, row_scale: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, buffers: Buffers
) -> None:
    """x [R, C] under row_scale [R, 1] into packed [R, C/2] and scale [R, C/16]."""
    blocks = in_blocks(buffers.take("ratio", x.shape, torch.float32).copy_(x), BLOCK)  # [R, C/16, 16]
    # Clamped since not every torch saturates when it casts to float8.
    scale.copy_((magnitude(blocks, (-1,)) / (e2m1.MAX * row_scale)).clamp(max=SCALE_MAX))
    step = scale.float() * row_scale
    # A block whose scale rounded to zero divides by infinity: its values become zero.
    blocks /= torch.where(step == 0, torch.inf, step).unsqueeze(-1)
    e2m1.pack(e2m1.encode(blocks, buffers).view(x.shape), out=packed)


def group_amax(dense: torch.Tensor, row_groups: int | None) -> torch.Tensor:
    """The largest magnitude of each matrix: float32 [...], or of each group of its rows, [..., G]."""
    *lead, rows, columns = dense.shape
    if row_groups is None:
        return magnitude(dense, (-2, -1))
    if row_groups < 1 or rows % row_groups:
        raise ShapeError(f"row_groups must divide the {rows} rows of dense, got {row_groups}")
    return magnitude(dense.reshape(*lead, row_groups, rows // row_groups, columns), (-2, -1))


def require_global_scale(global_scale: torch.Tensor, lead: tuple[int, ...], rows: int) -> None:
    """ShapeError unless global_scale is [...] or [..., G] with G dividing the rows."""
    shape = tuple(global_scale.shape)
    if shape == lead:
        return
    if shape[:-1] == lead and len(shape) > len(lead) and (rows % shape[-1] == 0 if shape[-1] else rows == 0):
        return
    raise ShapeError(
        f"global_scale must have shape {list(lead)}, or {[*lead, 'G']} with G dividing the {rows} rows, "
        f"got {list(shape)}"
    )


def _check_given(global_scale: torch.Tensor, dense: torch.Tensor) -> None:
    require_dtype("global_scale", global_scale, torch.float32)
    require_one_device(dense=dense, global_scale=global_scale)
    require_global_scale(global_scale, tuple(dense.shape[:-2]), dense.shape[-2])


def _per_matrix(name: str, scale: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A scalar per matrix that a checkpoint keeps as [...] or [..., 1], as [...]."""
    require_dtype(name, scale, torch.float32)
    return scale.squeeze(-1) if scale.shape == (*packed.shape[:-2], 1) else scale

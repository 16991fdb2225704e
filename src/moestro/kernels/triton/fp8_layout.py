"""4-bit weights in the layout that FP8 tensor cores read: NVFP4, 0.5625 byte a weight, and MXFP4, 0.53125.

A block is 64 rows x 128 columns, 4 KiB of codes and a byte for each scale: 512 of NVFP4's, 256 of MXFP4's. Sixteen
columns are four words of 16 bits, two registers when they are read: in each, the low three bits of
nibbles 0..3 are the magnitudes of columns 0..3 of an 8-column half, nibbles 4..7 those of columns 4..7, which is what
`prmt` takes as a selector; their signs stand in the nibbles' fourth bits, where one shift brings them to bytes' ends.

A scale is kept as a byte of e4m3, relative to its row: the largest of a row lies in (36, 72], so that all eight
products with e2m1 are e4m3 numbers once they are rounded (6 · 72 < 448), and the power of two goes into the row's
float32. That holds for scales down to 2^-5, 1150 to 2304 times smaller than the row's largest; codes under smaller ones
are rounded to the grid of 2^-5, an error of at most 2^-7 beside a largest weight of 216 to 432.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moestro.errors import FormatError
from moestro.formats import MXFP4, NVFP4, FP8Block
from moestro.formats.mxfp4 import decode_e8m0
from moestro.formats.pieces import dense_out
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton.chip import has_block_scales, is_hopper, multiplies_fp4
from moestro.kernels.triton.layout import PACKED, Packed
from moestro.kernels.triton.words import paired, row_order

ROWS, COLS = 64, 128
LARGEST = 72.0  # of a row's scales
SMALLEST = 2.0**-5
HALVES = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float32)  # twice the magnitudes of e2m1


class TritonFP4(Packed):
    """NVFP4 or MXFP4 weights [L, R, C] for products with e4m3 activations. Rows and columns are padded to blocks.

    words: int16 [L, Rb, Cb, 64, 32]; scales: [L, Rb, Cb, 64, 4], of 32 columns each: int16 of two e4m3 bytes, the even
    group's low, where a scale is of 16 columns (GROUP), uint8 where it is of 32.
    Its values are those that the kernels multiply: e2m1 · scale rounded to e4m3, times the row's scale; `dequantize`
    gives them. They are at most half a step of e4m3 (1/16) from the checkpoint's. `to_checkpoint` gives the codes and
    scales back, bit for bit where a scale was no negative one and none under SMALLEST: the products are not rounded there.
    """

    CODE: ClassVar[int] = -1  # no kernel of decode.py reads it
    WORD: ClassVar[torch.dtype] = torch.int16
    SCALE: ClassVar[torch.dtype] = torch.int16
    GROUP: ClassVar[int] = 16  # columns of a scale

    @classmethod
    def pack(cls, q: Any, gated: bool) -> Self:
        """Repack a checkpoint tensor [L, R, C], one expert at a time.

        Raises FormatError for a scale that is NaN.
        """
        experts, rows, columns = q.shape
        order = row_order(rows, gated, q.device)  # [Rp]
        blocks = -(-columns // COLS)
        shape = (experts, len(order) // ROWS, blocks, ROWS)
        words = torch.empty((*shape, 32), dtype=torch.int16, device=q.device)
        scales = torch.empty((*shape, 4), dtype=cls.SCALE, device=q.device)
        row_scale = torch.zeros((experts, len(order)), dtype=torch.float32, device=q.device)
        there = order >= 0
        for e in range(experts):
            codes, scale, whole = _pieces(q.expert(e))
            codes, byte, power = _relative(codes, scale)
            words[e] = _blocks(_to_words(_pad(codes, order, blocks * COLS, 0)), 32)
            scales[e] = _blocks(_pad(byte, order, blocks * COLS // cls.GROUP, 16).view(cls.SCALE), 4)
            row_scale[e, there] = (whole * power)[order[there]]
        return cls(words, scales, row_scale, cls._kept(q), rows, columns, gated)

    @classmethod
    def bytes_per_weight(cls) -> float:
        return 0.5 + 1 / cls.GROUP

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values that the kernels multiply, [..., R, C]; in `out` where there is one."""
        codes = _from_words(_rows_of(self.words))  # [..., Rp, Cp]
        scale = _rows_of(self.scales).contiguous().view(torch.float8_e4m3fn).float()  # [..., Rp, Cp / GROUP]
        half = HALVES.to(self.device)[(codes & 7).long()] * torch.where(codes >= 8, -0.5, 0.5)
        value = (
            (half.unflatten(-1, (-1, self.GROUP)) * scale.unsqueeze(-1))
            .to(torch.float8_e4m3fn)
            .float()
            .flatten(-2)
        )
        dense = self._in_order(value * self.row_scale.unsqueeze(-1))
        return dense_out(out, self.shape, dtype, self.device).copy_(dense)

    def _codes_and_scales(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(packed codes uint8 [..., R, C/2], e4m3 scales [..., R, C / GROUP], row scales float32 [..., R, 1])."""
        codes = self._in_order(_from_words(_rows_of(self.words)))
        byte = self._in_order(_rows_of(self.scales).contiguous().view(torch.uint8), self.GROUP)
        return paired(codes), byte.view(torch.float8_e4m3fn), self._in_order(self.row_scale.unsqueeze(-1))

    @classmethod
    def _expert(cls, *_: Any) -> torch.Tensor:
        raise NotImplementedError  # pack() fills all experts


class FP8FromNVFP4(TritonFP4):
    """See TritonFP4."""

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = "triton-fp8-nvfp4-r64c128"

    @classmethod
    def _kept(cls, q: Any) -> torch.Tensor:
        kept: torch.Tensor = q.global_scale
        return kept

    def to_checkpoint(self) -> NVFP4:
        packed, relative, row = self._codes_and_scales()
        power = row / NVFP4(packed, relative, self.kept).row_global_scale()
        return NVFP4(packed, (relative.float() * power).to(torch.float8_e4m3fn), self.kept)


class FP8FromMXFP4(TritonFP4):
    """See TritonFP4."""

    format: ClassVar[str] = "mxfp4"
    layout: ClassVar[str] = "triton-fp8-mxfp4-r64c128g32"
    SCALE: ClassVar[torch.dtype] = torch.uint8
    GROUP: ClassVar[int] = 32

    def to_checkpoint(self) -> MXFP4:
        packed, relative, row = self._codes_and_scales()
        exponent = torch.frexp(relative.double() * row.double())[1] - 1
        return MXFP4(packed, (exponent + 127).clamp(0, 254).to(torch.uint8))


class TritonE4M3(Packed):
    """FP8 blocks [L, R, C] for products with e4m3 activations: the checkpoint's values, rows in the kernels' order.

    words: e4m3 [L, Rp, C]; scales: float32 [L, ceil(R / 128), ceil(C / 128)], the checkpoint's.
    """

    format: ClassVar[str] = "fp8_block"
    layout: ClassVar[str] = "triton-e4m3-rows"
    CODE: ClassVar[int] = -1
    WORD: ClassVar[torch.dtype] = torch.float8_e4m3fn
    SCALE: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-2], self.rows, self.columns)

    @classmethod
    def pack(cls, q: Any, gated: bool) -> Self:
        """Repack a checkpoint tensor [L, R, C], one expert at a time."""
        experts, rows, columns = q.shape
        order = row_order(rows, gated, q.device)
        words = torch.empty((experts, len(order), columns), dtype=torch.uint8, device=q.device)
        for e in range(experts):
            words[e] = _pad(q.data[e].view(torch.uint8), order, columns, 0)
        nothing = torch.empty((experts, 0), device=q.device)
        e4m3 = words.view(torch.float8_e4m3fn)
        return cls(e4m3, q.scale_inv.contiguous(), nothing, nothing, rows, columns, gated)

    @classmethod
    def bytes_per_weight(cls) -> float:
        return 1.0

    def to_checkpoint(self) -> FP8Block:
        data = self._in_order(self.words.view(torch.uint8)).contiguous()
        return FP8Block(data.view(torch.float8_e4m3fn), self.scales)

    @classmethod
    def _expert(cls, *_: Any) -> torch.Tensor:
        raise NotImplementedError  # pack() fills all experts


PACKED_FP8: dict[str, type[Packed]] = {cls.format: cls for cls in (FP8FromNVFP4, FP8FromMXFP4, TritonE4M3)}


def block_scaled(problem: MoeProblem) -> bool:
    """Whether a problem goes to block-scaled tensor cores with e4m3 activations: weights with a power of two per 32."""
    return (
        problem.weight_format in ("mxfp4", "mxfp8") and problem.input_format == "fp8" and has_block_scales()
    )


def packed_type(problem: MoeProblem) -> type[Packed] | None:
    """The layout that a problem's weights are repacked to; None for those that are run as they are, or not at all."""
    if multiplies_fp4(problem) or block_scaled(problem):
        return None
    table = PACKED_FP8 if multiplies_fp8(problem) else PACKED
    return table.get(problem.weight_format)


def multiplies_fp8(problem: MoeProblem) -> bool:
    """Whether a problem goes to Hopper's FP8 products."""
    return problem.input_format == "fp8" and problem.weight_format in PACKED_FP8 and is_hopper()


def rounded_to_fp8(problem: MoeProblem) -> bool:
    """Whether rows are rounded to e4m3 and multiplied as bfloat16, which holds them: weights that no FP8 product takes."""
    return problem.input_format == "fp8" and not multiplies_fp8(problem) and not block_scaled(problem)


def descriptor(rows: torch.Tensor, block: int) -> TensorDescriptor:
    """What the tensor memory accelerator needs to copy blocks [block, 128] of e4m3 rows [R, C]."""
    return TensorDescriptor.from_tensor(rows, [block, COLS], gl.NVMMASharedLayout(128, 8, 2))


def _pieces(q: NVFP4 | MXFP4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [R, C], float32 scale of each group of columns [R, C / GROUP] >= 0, float32 [R] of the whole row)."""
    codes = torch.stack([q.packed & 15, q.packed >> 4], dim=-1).flatten(-2)
    if isinstance(q, MXFP4):
        scale = decode_e8m0(q.scale)
        whole = torch.ones(q.shape[-2], device=q.device)
    else:
        scale = q.scale.float()
        sign = ((scale < 0).to(torch.uint8) << 3).unsqueeze(-1)
        codes = (codes.unflatten(-1, (scale.shape[-1], -1)) ^ sign).flatten(-2)
        scale, whole = scale.abs(), q.row_global_scale().squeeze(-1).expand(q.shape[-2])
    if bool(torch.isnan(scale).any()):
        raise FormatError(f"{q.format} weights must have finite scales, got NaN")
    return codes, scale, whole


def _relative(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, e4m3 bytes of the scales over the row's power of two, that power float32 [R])."""
    scale = scale.double()  # a row's power of two may be beyond float32 before it meets the scale
    most = scale.amax(-1, keepdim=True)
    _, exponent = torch.frexp(LARGEST / torch.where(most > 0, most, LARGEST))
    relative = torch.ldexp(scale, exponent - 1)  # the largest of a row in (36, 72]
    small = (relative < SMALLEST).unsqueeze(-1)
    blocks = codes.unflatten(-1, (scale.shape[-1], -1))
    value = HALVES.to(codes.device)[(blocks & 7).long()] * (relative / SMALLEST).float().unsqueeze(
        -1
    )  # in halves of SMALLEST
    nearest = (
        (value.unsqueeze(-1) - HALVES.to(codes.device)).abs().argmin(-1).to(torch.uint8)
        if bool(small.any())
        else 0
    )
    codes = torch.where(small, nearest | (blocks & 8), blocks).flatten(-2).to(torch.uint8)
    byte = relative.clamp(min=SMALLEST).float().to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, byte, torch.ldexp(torch.ones_like(most), 1 - exponent).squeeze(-1).float()


def _pad(values: torch.Tensor, order: torch.Tensor, columns: int, fill: int) -> torch.Tensor:
    """[R, C] -> [Rp, columns] in the kernels' row order."""
    out = values.new_full((len(order), columns), fill)
    there = order >= 0
    out[there, : values.shape[1]] = values[order[there]]
    return out


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp] -> int16 [Rp, Cp / 4]."""
    eight = codes.to(torch.int64).unflatten(-1, (-1, 2, 4))  # [Rp, Cp / 8, half, 4]
    word = torch.zeros_like(eight[..., 0, 0])
    for j in range(4):
        for half, (shift, sign) in enumerate(((4 * j, 7 + 8 * j), (16 + 4 * j, 3 + 8 * j))):
            word |= (eight[..., half, j] & 7) << shift | (eight[..., half, j] >> 3) << sign
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    return signed.contiguous().view(torch.int16)


def _from_words(words: torch.Tensor) -> torch.Tensor:
    """int16 [..., Rp, Cp / 4] -> uint8 [..., Rp, Cp]."""
    word = words.contiguous().view(torch.int32).to(torch.int64)
    found = []
    for start, sign in ((0, 7), (16, 3)):
        found += [((word >> (start + 4 * j)) & 7) | ((word >> (sign + 8 * j)) & 1) << 3 for j in range(4)]
    return torch.stack(found, dim=-1).flatten(-2).to(torch.uint8)


def _blocks(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[Rp, Cb * width] -> [Rb, Cb, 64, width]."""
    blocks: torch.Tensor = rows.unflatten(0, (-1, ROWS)).unflatten(-1, (-1, width))
    return blocks.transpose(1, 2)


def _rows_of(blocks: torch.Tensor) -> torch.Tensor:
    """[..., Rb, Cb, 64, width] -> [..., Rp, Cb * width]."""
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)

"""Quantised weights as the Triton kernels read them: blocks of 64 rows and 64 columns, in reading order.

A block is 64 rows of 16 *words*, then the scales of its rows, each contiguous; the blocks of 64 rows follow each
other along the columns: a program that walks a strip of rows reads one stream. Word c of a row holds the codes of the
four columns c, c + 16, c + 32, c + 48 (16 bits for 4-bit codes, 32 for bytes), so that it is in the thread that feeds
column c (mod 16) of a wgmma or mma.sync A fragment: no shuffle.

What is particular to a format is one class here (`words`, `scales`, `row_scale` and the way back) and one branch of
`device/decode.py`. In 4-bit words three of the four codes reach the sign and the exponent of a bfloat16 with one shift
and one mask: e2m1's magnitude bits on bits 8..6 and its sign on bit 15 are the value · 2^-126, the subnormal 0.5
included. The fourth takes what is left. What a scale cannot hold goes into a float32 per row, which the epilogue
multiplies.

With a gate, rows are permuted: each 16 rows are 8 of gate and the matching 8 of up, which a thread of the
tensor core's accumulator holds side by side.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch

from moestro.formats import INT4, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.formats.base import FormatTensor
from moestro.formats.pieces import reduced
from moestro.kernels.triton.device import decode
from moestro.kernels.triton.words import (
    COLS,
    ROWS,
    bits_of,
    by_block,
    e4m3_of,
    fold_signs_and_zeros,
    from_byte_words,
    from_nibble_words,
    from_words,
    nan_rows,
    nibble_words,
    nibbles,
    pad,
    paired,
    row_order,
    scale_codes,
    to_byte_words,
    to_words,
)

# NVFP4: codes give e2m1 · 2^-126, scales give scale · 2^118: what is left to multiply in float32
RESIDUAL = 2.0**8
BYTES_OFFSET = 120  # e4m3's bits give e4m3 · 2^-120
NIBBLES_OFFSET = 126  # e2m1's bits give e2m1 · 2^-126
E8M0_NAN = 255


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights [..., R, C] in the kernels' layout. Rows and columns are padded to whole blocks."""

    words: torch.Tensor  # [..., Rb, Cb, 64, 16]
    scales: torch.Tensor  # [..., Rb, Cb, 64 / SCALE_ROWS]
    row_scale: torch.Tensor  # float32 [..., Rb * 64], what is left to multiply, of each kernel row
    kept: torch.Tensor  # what of the checkpoint's scales goes back as it came
    rows: int
    columns: int
    gated: bool

    format: ClassVar[str]
    layout: ClassVar[str]
    CODE: ClassVar[int]  # device/decode.py's name of the format
    WORD: ClassVar[torch.dtype]
    SCALE: ClassVar[torch.dtype]
    SCALE_ROWS: ClassVar[int] = 1  # rows of a block that share a scale
    INSTRUCTIONS: ClassVar[float] = 3.5  # per weight, counted in the SASS of the loop

    @classmethod
    def pack(cls, q: Any, gated: bool) -> Self:
        """Repack a checkpoint tensor [E, R, C], one expert at a time (the copies are one expert's)."""
        return cls(*cls._packed(q, gated), cls._kept(q), q.shape[1], q.shape[2], gated)

    @classmethod
    def _packed(cls, q: Any, gated: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(words, scales, row scales)."""
        experts, rows, columns = q.shape
        kernel_rows = row_order(rows, gated, q.device)  # [Rp]
        blocks = (experts, len(kernel_rows) // ROWS, -(-columns // COLS))
        words = torch.empty((*blocks, ROWS, 16), dtype=cls.WORD, device=q.device)
        scales = torch.empty((*blocks, ROWS // cls.SCALE_ROWS), dtype=cls.SCALE, device=q.device)
        row_scale = torch.zeros((experts, len(kernel_rows)), dtype=torch.float32, device=q.device)
        for e in range(experts):
            row_scale[e] = cls._expert(q, e, kernel_rows, words[e], scales[e])
        return words, scales, row_scale

    @classmethod
    @abstractmethod
    def _expert(
        cls, q: Any, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """Fill words and scales of expert e; its row scales [Rp]."""

    @classmethod
    def _kept(cls, q: Any) -> torch.Tensor:
        return torch.empty(q.shape[0], 0, device=q.device)

    @classmethod
    def bytes_per_weight(cls) -> float:
        """Of words and scales, in whole blocks."""
        scales = ROWS // cls.SCALE_ROWS * cls.SCALE.itemsize
        return (ROWS * 16 * cls.WORD.itemsize + scales) / (ROWS * COLS)

    @classmethod
    def row_bytes(cls) -> int:
        """Of one row of a block in shared memory, where every row has its scale."""
        return 16 * cls.WORD.itemsize + cls.SCALE.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-4], self.rows, self.columns)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: v for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense values [..., R, C]; in `out` where there is one."""
        return self.to_checkpoint().dequantize(dtype, out=out)

    def expert(self, index: int) -> Self:
        """[..., R, C] at `index` of the first dimension, without a copy."""
        tensors = {name: v[index] for name, v in self._tensors().items()}
        return type(self)(**tensors, rows=self.rows, columns=self.columns, gated=self.gated)

    def to(self, device: torch.device | str) -> Self:
        tensors = {name: v.to(device) for name, v in self._tensors().items()}
        return type(self)(**tensors, rows=self.rows, columns=self.columns, gated=self.gated)

    def __reduce__(self) -> Any:
        return reduced(self)

    @abstractmethod
    def to_checkpoint(self) -> FormatTensor:
        """The same values in the checkpoint layout (bit for bit, but for codes under a zero scale)."""

    def _in_order(self, values: torch.Tensor, per_column: int = 1) -> torch.Tensor:
        """[..., Rp, Cp / per_column] in kernel order -> [..., R, C / per_column] in the checkpoint's."""
        kernel_rows = row_order(self.rows, self.gated, self.device)
        there = torch.nonzero(kernel_rows >= 0).squeeze(-1)
        place = torch.empty(self.rows, dtype=torch.long, device=self.device)
        place[kernel_rows[there]] = there  # checkpoint row -> kernel row
        return values.index_select(-2, place)[..., : self.columns // per_column]


class TritonNVFP4(Packed):
    """Codes in 16-bit words; scales as 5 exponent bits (of scale · 2^10) and 3 of mantissa: e4m3 with its subnormals
    normalised, so that `code << 4` plus a constant is a bfloat16. A block whose scale is zero has zero codes instead.
    """

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = "triton-r64c64"
    CODE: ClassVar[int] = decode.NVFP4.value
    WORD: ClassVar[torch.dtype] = torch.int16
    SCALE: ClassVar[torch.dtype] = torch.int32  # byte p = columns 16p .. 16p + 15

    @classmethod
    def _expert(
        cls, q: NVFP4, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        codes, scale = nibbles(q.packed[e]), scale_codes(q.scale[e])
        codes, scale = fold_signs_and_zeros(codes, q.scale[e].view(torch.uint8), scale)
        words.copy_(to_words(pad(codes, kernel_rows, words.shape[1] * COLS)))
        padded = pad(scale, kernel_rows, words.shape[1] * COLS // 16)
        scales.copy_(by_block(padded.clone(memory_format=torch.contiguous_format).view(torch.int32)))
        per_row = q.row_global_scale()[e].squeeze(-1).expand(q.shape[1])
        return pad(per_row.unsqueeze(-1), kernel_rows, 1).squeeze(-1) * RESIDUAL

    @classmethod
    def _kept(cls, q: NVFP4) -> torch.Tensor:
        return q.global_scale

    def to_checkpoint(self) -> NVFP4:
        codes = self._in_order(from_words(self.words))
        rows = self.scales.transpose(-1, -2).flatten(-3, -2)
        scale = self._in_order(rows.clone(memory_format=torch.contiguous_format).view(torch.uint8), 16)
        return NVFP4(paired(codes), e4m3_of(scale).view(torch.float8_e4m3fn), self.kept)


class _PowersOfTwo(Packed):
    """Scales that are powers of two, one per 32 columns: a word of two bfloat16, of columns 0..31 and 32..63.

    They are relative to the largest of the row, which is the row's scale. OFFSET (of the codes' bits) leaves room for
    all that are not more than 2^(126 + OFFSET) smaller than that; those become zeros. A NaN makes its row NaN.
    """

    SCALE: ClassVar[torch.dtype] = torch.int32
    OFFSET: ClassVar[int]

    @classmethod
    def _powers(cls, scale: torch.Tensor, kernel_rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Fill the scales from e8m0 [R, C/32]; the row scales [Rp]."""
        exponent = scale.to(torch.int32) - 127
        unknown = (scale == E8M0_NAN).any(-1)
        base = exponent.amax(-1).clamp(-126, 127)
        field = (exponent - base.unsqueeze(-1) + cls.OFFSET + 127).clamp(0, 254)
        bits = pad(field << 7, kernel_rows, scales.shape[1] * COLS // 32)  # [Rp, 2 Cb]
        scales.copy_(by_block(bits[:, 0::2] | bits[:, 1::2] << 16))
        row = torch.where(unknown, torch.nan, torch.ldexp(torch.ones_like(base, dtype=torch.float32), base))
        return pad(row.unsqueeze(-1), kernel_rows, 1).squeeze(-1)

    def _exponents(self) -> torch.Tensor:
        """e8m0 uint8 [..., R, C/32]."""
        rows = self.scales.transpose(-1, -2).flatten(-3, -2)  # [..., Rp, Cb]
        field = torch.stack([rows & 0xFFFF, (rows >> 16) & 0xFFFF], -1).flatten(-2) >> 7
        base = torch.frexp(self.row_scale)[1] - 1
        e8m0 = (field + base.unsqueeze(-1) - self.OFFSET).clamp(0, 254)
        e8m0 = torch.where(self.row_scale.isnan().unsqueeze(-1), E8M0_NAN, e8m0)
        return self._in_order(e8m0.to(torch.uint8), 32)


class TritonMXFP4(_PowersOfTwo):
    """Words as NVFP4's; scales that are powers of two."""

    format: ClassVar[str] = "mxfp4"
    layout: ClassVar[str] = "triton-mxfp4-r64c64"
    CODE: ClassVar[int] = decode.MXFP4.value
    WORD: ClassVar[torch.dtype] = torch.int16
    OFFSET: ClassVar[int] = NIBBLES_OFFSET

    @classmethod
    def _expert(
        cls, q: MXFP4, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        words.copy_(to_words(pad(nibbles(q.packed[e]), kernel_rows, words.shape[1] * COLS)))
        return cls._powers(q.scale[e], kernel_rows, scales)

    def to_checkpoint(self) -> MXFP4:
        return MXFP4(paired(self._in_order(from_words(self.words))), self._exponents())


class TritonMXFP8(_PowersOfTwo):
    """A byte each of four columns in a 32-bit word; scales that are powers of two."""

    format: ClassVar[str] = "mxfp8"
    layout: ClassVar[str] = "triton-mxfp8-r64c64"
    CODE: ClassVar[int] = decode.MXFP8.value
    WORD: ClassVar[torch.dtype] = torch.int32
    OFFSET: ClassVar[int] = BYTES_OFFSET
    INSTRUCTIONS: ClassVar[float] = 3.5

    @classmethod
    def _expert(
        cls, q: MXFP8, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        data = q.data[e].view(torch.uint8)
        words.copy_(to_byte_words(pad(data, kernel_rows, words.shape[1] * COLS)))
        return nan_rows(data, kernel_rows, cls._powers(q.scale[e], kernel_rows, scales))

    def to_checkpoint(self) -> MXFP8:
        data = self._in_order(from_byte_words(self.words)).view(torch.float8_e4m3fn)
        return MXFP8(data, self._exponents())


class TritonFP8Block(Packed):
    """A byte each of four columns in a 32-bit word; a 64-bit scale for 8 rows (which are in one block of 128 rows,
    and both of gate or of up): of columns 0..31 and of 32..63, each as two bfloat16 whose sum is scale · 2^120,
    relative to the power of two above the largest of these rows.
    """

    format: ClassVar[str] = "fp8_block"
    layout: ClassVar[str] = "triton-fp8-r64c64"
    CODE: ClassVar[int] = decode.FP8_BLOCK.value
    WORD: ClassVar[torch.dtype] = torch.int32
    SCALE: ClassVar[torch.dtype] = torch.int64
    SCALE_ROWS: ClassVar[int] = 8
    INSTRUCTIONS: ClassVar[float] = 4.5

    @classmethod
    def _expert(
        cls, q: FP8Block, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        data = q.data[e].view(torch.uint8)
        words.copy_(to_byte_words(pad(data, kernel_rows, words.shape[1] * COLS)))
        block = 128
        eighth = kernel_rows[:: cls.SCALE_ROWS]  # a padded row's scale is never used
        columns = (torch.arange(scales.shape[1] * 2, device=q.device) * 32 // block).clamp(
            max=q.scale_inv.shape[-1] - 1
        )
        scale = q.scale_inv[e][eighth.clamp(min=0) // block][:, columns]  # [Rp/8, 2 Cb]
        power = (torch.frexp(scale.abs().amax(-1))[1]).clamp(-126, 127)  # scale <= 2^power
        whole = torch.ldexp(scale.double(), (BYTES_OFFSET - power).unsqueeze(-1)).float()
        high = whole.bfloat16()
        low = (whole - high.float()).bfloat16()
        both = bits_of(high) | bits_of(low) << 16
        scales.copy_((both[:, 0::2] | both[:, 1::2] << 32).view(-1, 8, scales.shape[1]).transpose(1, 2))
        rows = torch.ldexp(torch.ones_like(power, dtype=torch.float32), power).repeat_interleave(8)
        return nan_rows(data, kernel_rows, torch.where(kernel_rows >= 0, rows, 0.0))

    @classmethod
    def _kept(cls, q: FP8Block) -> torch.Tensor:
        return q.scale_inv

    def to_checkpoint(self) -> FP8Block:
        data = self._in_order(from_byte_words(self.words)).view(torch.float8_e4m3fn)
        return FP8Block(data, self.kept)


@dataclass(frozen=True, eq=False)
class TritonINT4(Packed):
    """Four codes in a 16-bit word, plane p at bits 4p; a 64-bit scale for each row: of columns 0..31 and of 32..63 a
    bfloat16 scale, and as bfloat16 -(128 + zero). A scale that is no bfloat16 is rounded to one (2^-9).
    """

    zero: torch.Tensor  # uint8 [..., R, C/G] of the checkpoint, as `kept` has its scales

    format: ClassVar[str] = "int4"
    layout: ClassVar[str] = "triton-int4-r64c64"
    CODE: ClassVar[int] = decode.INT4.value
    WORD: ClassVar[torch.dtype] = torch.int16
    SCALE: ClassVar[torch.dtype] = torch.int64

    @classmethod
    def pack(cls, q: Any, gated: bool) -> Self:
        words, scales, row_scale = cls._packed(q, gated)
        return cls(words, scales, row_scale, q.scale, q.shape[1], q.shape[2], gated, q.zero)

    @classmethod
    def _expert(
        cls, q: INT4, e: int, kernel_rows: torch.Tensor, words: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        words.copy_(nibble_words(pad(nibbles(q.packed[e]), kernel_rows, words.shape[1] * COLS)))
        repeats, columns = q.group // 32, scales.shape[1] * COLS // 32
        scale = q.scale[e].repeat_interleave(repeats, -1).bfloat16()  # [R, C/32]
        eights = torch.full_like(q.scale[e], 8, dtype=torch.uint8)
        zero = (q.zero[e] if q.zero.shape[-1] else eights).repeat_interleave(repeats, -1)
        less = -(128.0 + zero.float()).bfloat16()
        s, z = (pad(bits_of(part), kernel_rows, columns) for part in (scale, less))  # [Rp, 2 Cb]
        scales.copy_(by_block(s[:, 0::2] | s[:, 1::2] << 16 | z[:, 0::2] << 32 | z[:, 1::2] << 48))
        return torch.where(kernel_rows >= 0, 1.0, 0.0)

    def to_checkpoint(self) -> INT4:
        return INT4(paired(self._in_order(from_nibble_words(self.words))), self.kept, self.zero)


PACKED: dict[str, type[Packed]] = {
    cls.format: cls for cls in (TritonNVFP4, TritonMXFP4, TritonMXFP8, TritonFP8Block, TritonINT4)
}

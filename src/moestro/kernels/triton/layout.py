"""The NVFP4 weights as the Triton kernels read them: blocks of 64 rows and 64 columns, in reading order.

One block is 2 KiB of codes and 256 bytes of scales, each contiguous, and the blocks of 64 rows follow each
other along the columns: a program that walks a strip of rows reads one stream. Within a row of a block,
16-bit word c holds the four columns c, c + 16, c + 32, c + 48, so that

- word c of a row is in the thread that feeds column c (mod 16) of a wgmma or mma.sync A fragment: no shuffle;
- each of the four is one scale group of 16, so its scale is one number per row;
- three of the four reach the sign and the exponent of a bfloat16 with one shift and one mask. e2m1's
  magnitude bits on bits 8..6 and its sign on bit 15 are the value · 2^-126, the subnormal 0.5 included. The
  fourth takes what is left.

A scale is kept as 5 exponent bits (of scale · 2^10) and 3 of mantissa: e4m3 with its subnormals normalised,
so that `code << 4` plus a constant is a bfloat16. A block whose scale is zero has zero codes instead.

With a gate, rows are permuted: each 16 rows are 8 of gate and the matching 8 of up, which a thread of the
tensor core's accumulator holds side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Self

import torch

from moestro.formats import NVFP4

ROWS = 64  # of a block
COLS = 64  # of a block
LAYOUT = "triton-r64c64"
# Where the four codes of a word go: (mask of the code's bits, left shift) of each piece.
PLACES = (
    ((0b1000, 12), (0b0111, 6)),  # sign to 15, magnitude to 8..6
    ((0b1000, 9), (0b0111, 3)),  # 12, 5..3: the first, shifted right by 3
    ((0b1000, 6), (0b0111, 0)),  # 9, 2..0: shifted right by 6
    ((0b1000, 11), (0b0100, 11), (0b0011, 10)),  # 14, 13, 11..10
)
# codes give e2m1 · 2^-126, scales give scale · 2^118: what is left to multiply in float32
RESIDUAL = 2.0**8


@dataclass(frozen=True, eq=False)
class TritonNVFP4:
    """NVFP4 weights [..., R, C] in the kernels' layout. Rows and columns are padded to whole blocks."""

    words: torch.Tensor  # int16 [..., Rb, Cb, 64, 16]
    scales: torch.Tensor  # int32 [..., Rb, Cb, 64], byte p = columns 16p .. 16p+15
    row_scale: torch.Tensor  # float32 [..., Rb * 64], global scale · RESIDUAL of each kernel row
    global_scale: torch.Tensor  # float32 [...] or [..., G], as in the checkpoint
    rows: int
    columns: int
    gated: bool

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = LAYOUT

    @classmethod
    def pack(cls, q: NVFP4, gated: bool) -> Self:
        """Repack a checkpoint tensor [E, R, C], one expert at a time (the copies are one expert's)."""
        experts, rows, columns = q.shape
        kernel_rows = row_order(rows, gated, q.device)  # [Rp]
        padded, blocks = len(kernel_rows), -(-columns // COLS)
        words = torch.empty((experts, padded // ROWS, blocks, ROWS, 16), dtype=torch.int16, device=q.device)
        scales = torch.empty((experts, padded // ROWS, blocks, ROWS), dtype=torch.int32, device=q.device)
        for e in range(experts):
            codes, scale = _codes(q.packed[e]), _scale_codes(q.scale[e])
            codes, scale = _fold_signs_and_zeros(codes, q.scale[e].view(torch.uint8), scale)
            words[e] = _to_words(_pad(codes, kernel_rows, blocks * COLS))
            scales[e] = _to_scale_words(_pad(scale, kernel_rows, blocks * COLS // 16))
        per_row = q.row_global_scale().squeeze(-1).expand(experts, rows)
        row_scale = torch.zeros((experts, padded), dtype=torch.float32, device=q.device)
        there = kernel_rows >= 0
        row_scale[:, there] = per_row[:, kernel_rows[there]] * RESIDUAL
        return cls(words, scales, row_scale, q.global_scale, rows, columns, gated)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-4], self.rows, self.columns)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.words, self.scales, self.row_scale, self.global_scale))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense values [..., R, C]."""
        return self.to_checkpoint().dequantize(dtype)

    def expert(self, index: int) -> TritonNVFP4:
        """[..., R, C] at `index` of the first dimension, without a copy."""
        tensors = {f.name: v[index] for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        return TritonNVFP4(**tensors, rows=self.rows, columns=self.columns, gated=self.gated)

    def to(self, device: torch.device | str) -> Self:
        tensors = {f.name: v.to(device) for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}
        return type(self)(**tensors, rows=self.rows, columns=self.columns, gated=self.gated)

    def to_checkpoint(self) -> NVFP4:
        """The same values in the checkpoint layout (bit for bit, but for codes under a zero scale)."""
        kernel_rows = row_order(self.rows, self.gated, self.device)
        there = torch.nonzero(kernel_rows >= 0).squeeze(-1)
        place = torch.empty(self.rows, dtype=torch.long, device=self.device)
        place[kernel_rows[there]] = there  # checkpoint row -> kernel row
        codes = _from_words(self.words).index_select(-2, place)[..., : self.columns]
        scale = _from_scale_words(self.scales).index_select(-2, place)[..., : self.columns // 16]
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return NVFP4(packed, _e4m3_of(scale).view(torch.float8_e4m3fn), self.global_scale)


def row_order(rows: int, gated: bool, device: torch.device) -> torch.Tensor:
    """[Rp] int64: the checkpoint row at each kernel row, -1 for padding; Rp is a multiple of 64."""
    if not gated:
        order = torch.arange(-(-rows // ROWS) * ROWS, device=device)
        return torch.where(order < rows, order, -1)
    half = rows // 2
    groups = -(-half // (ROWS // 2)) * (ROWS // 2) // 8
    index = torch.arange(groups * 8, device=device).view(groups, 1, 8)
    order = torch.cat([torch.where(index < half, index, -1), torch.where(index < half, index + half, -1)], 1)
    return order.flatten()


def _pad(values: torch.Tensor, kernel_rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[R, C] -> [Rp, columns] in the kernels' row order, zeros where there is nothing."""
    out = values.new_zeros((len(kernel_rows), columns))
    there = kernel_rows >= 0
    out[there, : values.shape[1]] = values[kernel_rows[there]]
    return out


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C/2] -> uint8 [R, C]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _fold_signs_and_zeros(
    codes: torch.Tensor, scale_bytes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative scales flip their codes; zero scales zero them."""
    blocks = codes.unflatten(-1, (-1, 16))
    flip = ((scale_bytes >> 7) << 3).unsqueeze(-1)
    zero = (scale_bytes & 127 == 0).unsqueeze(-1)
    return torch.where(zero, 0, blocks ^ flip).flatten(-2).to(torch.uint8), scale


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp] -> int16 [Rb, Cb, 64, 16]."""
    planes = codes.to(torch.int32).unflatten(-1, (-1, 4, 16))  # [Rp, Cb, 4, 16]
    word = torch.zeros_like(planes[..., 0, :])
    for p, pieces in enumerate(PLACES):
        for mask, shift in pieces:
            word |= (planes[..., p, :] & mask) << shift
    signed: torch.Tensor = torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)
    blocks: torch.Tensor = signed.unflatten(0, (-1, ROWS))  # [Rb, 64, Cb, 16]
    return blocks.transpose(1, 2)


def _from_words(words: torch.Tensor) -> torch.Tensor:
    """int16 [..., Rb, Cb, 64, 16] -> uint8 [..., Rp, Cp]."""
    wide = words.to(torch.int32)
    planes = [sum((wide >> shift) & mask for mask, shift in pieces) for pieces in PLACES]
    codes = torch.stack(planes, dim=-2).to(torch.uint8)  # type: ignore[arg-type]
    return codes.transpose(-4, -3).flatten(-5, -4).flatten(-3)  # via [..., Rb, 64, Cb, 4, 16]


def _to_scale_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp/16] -> int32 [Rb, Cb, 64]."""
    words = codes.clone(memory_format=torch.contiguous_format).view(torch.int32)  # [Rp, Cb], little-endian
    blocks: torch.Tensor = words.unflatten(0, (-1, ROWS))  # [Rb, 64, Cb]
    return blocks.transpose(1, 2)


def _from_scale_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., Rb, Cb, 64] -> uint8 [..., Rp, Cp/16]."""
    rows = words.transpose(-1, -2).flatten(-3, -2)
    return rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@lru_cache(maxsize=1)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 magnitude byte -> scale code, scale code -> e4m3 byte), uint8 [128] and [256]."""
    to_code, to_byte = torch.zeros(128, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    for byte in range(1, 127):  # 127 is NaN
        value = torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        mantissa, exponent = torch.frexp(value)  # mantissa in [0.5, 1)
        code = (int(exponent) - 1 + 10) << 3 | int((float(mantissa) * 2 - 1) * 8)
        to_code[byte], to_byte[code] = code, byte
    return to_code, to_byte


def _scale_codes(scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [R, C/16] -> scale codes."""
    return _tables()[0].to(scale.device)[(scale.view(torch.uint8) & 127).long()]


def _e4m3_of(codes: torch.Tensor) -> torch.Tensor:
    """Scale codes -> the bytes of float8_e4m3fn."""
    return _tables()[1].to(codes.device)[codes.long()]

"""Codes, words and rows: how a checkpoint's codes become the words of layout.py, and go back."""

from __future__ import annotations

from functools import lru_cache

import torch

ROWS = 64  # of a block
COLS = 64  # of a block
# Where the four codes of a word go: (mask of the code's bits, left shift) of each piece.
PLACES = (
    ((0b1000, 12), (0b0111, 6)),  # sign to 15, magnitude to 8..6
    ((0b1000, 9), (0b0111, 3)),  # 12, 5..3: the first, shifted right by 3
    ((0b1000, 6), (0b0111, 0)),  # 9, 2..0: shifted right by 6
    ((0b1000, 11), (0b0100, 11), (0b0011, 10)),  # 14, 13, 11..10
)


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


def kernel_rows_of(rows: int, gated: bool) -> int:
    """Rows of one expert in the packed layout: len(row_order)."""
    return -(-(rows // 2) // 32) * 64 if gated else -(-rows // 64) * 64


def pad(values: torch.Tensor, kernel_rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[R, C] -> [Rp, columns] in the kernels' row order, zeros where there is nothing."""
    out = values.new_zeros((len(kernel_rows), columns))
    there = kernel_rows >= 0
    out[there, : values.shape[1]] = values[kernel_rows[there]]
    return out


def by_block(values: torch.Tensor) -> torch.Tensor:
    """[Rp, Cb] -> [Rb, Cb, 64]."""
    blocks: torch.Tensor = values.unflatten(0, (-1, ROWS))  # [Rb, 64, Cb]
    return blocks.transpose(1, 2)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 -> int64 of its 16 bits."""
    return values.view(torch.int16).to(torch.int64) & 0xFFFF


def nan_rows(data: torch.Tensor, kernel_rows: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Row scales, NaN where a row of e4m3 bytes [R, C] has a NaN: decoding gives those a number."""
    unknown = (data & 127 == 127).any(-1, keepdim=True)
    return torch.where(pad(unknown, kernel_rows, 1).squeeze(-1), torch.nan, row_scale)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C/2] -> uint8 [R, C]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def paired(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C] -> uint8 [..., C/2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def fold_signs_and_zeros(
    codes: torch.Tensor, scale_bytes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative scales flip their codes; zero scales zero them."""
    blocks = codes.unflatten(-1, (-1, 16))
    flip = ((scale_bytes >> 7) << 3).unsqueeze(-1)
    zero = (scale_bytes & 127 == 0).unsqueeze(-1)
    return torch.where(zero, 0, blocks ^ flip).flatten(-2).to(torch.uint8), scale


def to_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp] -> int16 [Rb, Cb, 64, 16]."""
    planes = codes.to(torch.int32).unflatten(-1, (-1, 4, 16))  # [Rp, Cb, 4, 16]
    word = torch.zeros_like(planes[..., 0, :])
    for p, pieces in enumerate(PLACES):
        for mask, shift in pieces:
            word |= (planes[..., p, :] & mask) << shift
    signed: torch.Tensor = torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)
    blocks: torch.Tensor = signed.unflatten(0, (-1, ROWS))  # [Rb, 64, Cb, 16]
    return blocks.transpose(1, 2)


def from_words(words: torch.Tensor) -> torch.Tensor:
    """int16 [..., Rb, Cb, 64, 16] -> uint8 [..., Rp, Cp]."""
    wide = words.to(torch.int32)
    planes = [sum((wide >> shift) & mask for mask, shift in pieces) for pieces in PLACES]
    codes = torch.stack(planes, dim=-2).to(torch.uint8)  # type: ignore[arg-type]
    return codes.transpose(-4, -3).flatten(-5, -4).flatten(-3)  # via [..., Rb, 64, Cb, 4, 16]


def nibble_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp] -> int16 [Rb, Cb, 64, 16], nibble p of a word is plane p."""
    planes = codes.to(torch.int32).unflatten(-1, (-1, 4, 16))  # [Rp, Cb, 4, 16]
    word = planes[..., 0, :] | planes[..., 1, :] << 4 | planes[..., 2, :] << 8 | planes[..., 3, :] << 12
    signed: torch.Tensor = torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)
    return signed.unflatten(0, (-1, ROWS)).transpose(1, 2)  # type: ignore[no-any-return]


def from_nibble_words(words: torch.Tensor) -> torch.Tensor:
    """int16 [..., Rb, Cb, 64, 16] -> uint8 [..., Rp, Cp]."""
    wide = words.to(torch.int32)
    codes = torch.stack([(wide >> 4 * p) & 15 for p in range(4)], dim=-2).to(torch.uint8)
    return codes.transpose(-4, -3).flatten(-5, -4).flatten(-3)


def to_byte_words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [Rp, Cp] -> int32 [Rb, Cb, 64, 16], byte p of a word is plane p."""
    blocks = codes.unflatten(0, (-1, ROWS)).unflatten(-1, (-1, 4, 16))  # [Rb, 64, Cb, 4, 16]
    words: torch.Tensor = blocks.permute(0, 2, 1, 4, 3).contiguous().view(torch.int32)
    return words.squeeze(-1)


def from_byte_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., Rb, Cb, 64, 16] -> uint8 [..., Rp, Cp]."""
    planes = words.contiguous().unsqueeze(-1).view(torch.uint8)  # [..., Rb, Cb, 64, 16, 4]
    return planes.transpose(-1, -2).transpose(-4, -3).flatten(-5, -4).flatten(-3)


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


def scale_codes(scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [R, C/16] -> scale codes."""
    return _tables()[0].to(scale.device)[(scale.view(torch.uint8) & 127).long()]


def e4m3_of(codes: torch.Tensor) -> torch.Tensor:
    """Scale codes -> the bytes of float8_e4m3fn."""
    return _tables()[1].to(codes.device)[codes.long()]

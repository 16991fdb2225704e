"""e2m1, the 4-bit float of NVFP4 and MXFP4 (OCP Microscaling Formats v1.0, §5.3.3).

A code is sign·8 + magnitude, the magnitudes 0..7 standing for 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two codes share a
byte, the even column in the low nibble. Both directions are arithmetic on whole tensors, without a table:
nothing to keep per device, and nothing to copy under torch.compile or in a CUDA graph.
"""

from __future__ import annotations

import torch

from moestro.formats.buffers import Buffers

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# At the top of a float16, its exponent and mantissa bits meeting the half's, a code reads as value · 2^-14:
# the subnormal 0.5 becomes a subnormal half, which converts to float32 without float32 subnormals.
HALF_SHIFT = 2.0**14


def encode(ratio: torch.Tensor, buffers: Buffers | None = None) -> torch.Tensor:
    """Codes (uint8) of contiguous float32 `ratio`, which is overwritten.

    Rounds to nearest, ties to the even code, and saturates at ±6.
    """
    take = (buffers or Buffers(ratio.device)).take
    # Signs as integers, and codes by way of int8: a CPU's signbit and float-to-uint8 casts take 5 times as long.
    signs = torch.bitwise_right_shift(
        ratio.view(torch.int32), 28, out=take("signs", ratio.shape, torch.int32)
    ).bitwise_and_(8)
    a = ratio.abs_()
    # Codes grow by 2 per unit below 2, by 1 below 4, by 1/2 above: the least of the three is right.
    code = torch.round(a, out=take("code", a.shape, torch.float32)).add_(2)
    high = torch.mul(a, 0.5, out=take("high", a.shape, torch.float32)).round_().add_(4)
    torch.minimum(code, high, out=code)
    torch.minimum(code, a.mul_(2).round_(), out=code).clamp_(max=7)
    codes = take("codes", a.shape, torch.int8).copy_(code)
    return codes.bitwise_or_(take("sign_codes", a.shape, torch.int8).copy_(signs)).view(torch.uint8)


def pack(codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes [..., C] (uint8, 0..15) to bytes [..., C/2], the even column in the low nibble."""
    if (
        torch.compiler.is_compiling()
        or not codes.is_contiguous()
        or codes.storage_offset() % 2
        or not codes.numel()
    ):
        return torch.bitwise_left_shift(codes[..., 1::2], 4, out=out).bitwise_or_(codes[..., 0::2])
    pairs = codes.view(torch.int16)  # little-endian: the even column below; the cast keeps the low byte
    both = pairs.bitwise_right_shift(4).bitwise_or_(pairs)
    return both.to(torch.uint8) if out is None else out.copy_(both)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., C/2] to codes [..., C] (uint8, 0..15)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., C/2] to values [..., C] in float32, exactly."""
    return decode_half(packed).float().mul_(HALF_SHIFT)


def decode_half(packed: torch.Tensor, buffers: Buffers | None = None) -> torch.Tensor:
    """Bytes [..., C/2] to values · 2^-14 [..., C] in float16, exactly."""
    take = (buffers or Buffers(packed.device)).take
    # A little-endian int32 is two halves, the low one (the even column) first. One product puts both codes
    # near the top of their half: magnitudes in place (bits 9..11, 25..27), signs 3 bits below theirs.
    bits = take("bits", packed.shape, torch.int32).copy_(packed).mul_((1 << 9) | (1 << 21))
    halves = torch.bitwise_and(bits, 0x0E000E00, out=take("halves", bits.shape, torch.int32))
    halves |= bits.bitwise_left_shift_(3).bitwise_and_(-0x7FFF8000)
    return halves.view(torch.float16)

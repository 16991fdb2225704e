"""e2m1, the 4-bit float of NVFP4 and MXFP4 (OCP Microscaling Formats v1.0, §5.3.3).

A code is sign·8 + magnitude, the magnitudes 0..7 standing for 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two codes share a
byte, the even column in the low nibble. Both directions are arithmetic on whole tensors, without a table:
nothing to keep per device, and nothing to copy under torch.compile or in a CUDA graph.
"""

from __future__ import annotations

import torch

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# At the top of a float16, its exponent and mantissa bits meeting the half's, a code reads as value · 2^-14:
# the subnormal 0.5 becomes a subnormal half, which converts to float32 without float32 subnormals.
HALF_SHIFT = 2.0**14


def encode(ratio: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of float32 `ratio`: round to nearest, ties to the even code, saturating at ±6."""
    a = ratio.abs()
    # Codes grow by 2 per unit below 2, by 1 below 4, by 1/2 above: the least of the three is right.
    code = torch.round(a * 2)
    code = torch.minimum(code, torch.round(a).add_(2))
    code = torch.minimum(code, a.mul_(0.5).round_().add_(4)).clamp_(max=7)
    return code.to(torch.uint8) | (torch.signbit(ratio).to(torch.uint8) << 3)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., C] (uint8, 0..15) to bytes [..., C/2], the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., C/2] to codes [..., C] (uint8, 0..15)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., C/2] to values [..., C] in float32, exactly."""
    return decode_half(packed).float().mul_(HALF_SHIFT)


def decode_half(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., C/2] to values · 2^-14 [..., C] in float16, exactly."""
    # A little-endian int32 is two halves, the low one (the even column) first. One product puts both codes
    # near the top of their half: magnitudes in place (bits 9..11, 25..27), signs 3 bits below theirs.
    bits = packed.to(torch.int32).mul_((1 << 9) | (1 << 21))
    halves = bits & 0x0E000E00
    halves |= bits.bitwise_left_shift_(3).bitwise_and_(-0x7FFF8000)
    return halves.view(torch.float16)

"""ModelOpt's formulas, written out from modelopt 0.47 (quantization/qtensor/*.py): a dense matrix to what it exports.

Independent of moestro.formats. Each gives the tensors of a projection by suffix, and the values that they stand for
in float64.
"""

from __future__ import annotations

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BETWEEN = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # where rounding goes from one to the next
TO_EVEN = BETWEEN[[1, 3, 5]]  # a value just there goes up, as the lower neighbour is odd
E4M3_MAX, E2M1_MAX = 448.0, 6.0
Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def nvfp4(w: torch.Tensor, scale_2: torch.Tensor | None = None) -> Made:
    """scale_2 = amax / (6 * 448); a block's scale = its amax / (6 * scale_2), 1 where that is 0, in e4m3 within
    2^-9 .. 448; codes to the nearest, ties to even.
    """
    w = w.float()
    blocks = w.unflatten(-1, (-1, 16))
    scale_2 = w.abs().amax() / (E2M1_MAX * E4M3_MAX) if scale_2 is None else scale_2
    scale = blocks.abs().amax(-1) / (E2M1_MAX * scale_2)
    scale = torch.where(scale == 0, 1.0, scale).clamp(2**-9, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = (blocks / (scale.float() * scale_2)[..., None]).flatten(-2)
    size = scaled.abs()
    codes = torch.searchsorted(BETWEEN, size) + (size[..., None] == TO_EVEN).any(-1)
    values = torch.where(w < 0, -1.0, 1.0).double() * E2M1.double()[codes]
    values = (values.unflatten(-1, (-1, 16)) * scale.double()[..., None]).flatten(-2) * scale_2.double()
    pieces = {"weight": packed(codes + 8 * (w < 0)), "weight_scale": scale, "weight_scale_2": scale_2}
    return pieces, values


def mxfp4(w: torch.Tensor) -> Made:
    """A block's exponent = ceil(log2(amax / 6)), -127 at the least; codes to the nearest, ties down; 0 is -0."""
    w = w.float()
    blocks = w.unflatten(-1, (-1, 32))
    exponent = torch.log2(blocks.abs().amax(-1) / E2M1_MAX).clamp(min=-127).ceil()
    scaled = (blocks / torch.exp2(exponent)[..., None]).flatten(-2)
    codes = torch.searchsorted(BETWEEN, scaled.abs().contiguous())
    values = torch.where(w < 0, -1.0, 1.0).double() * E2M1.double()[codes]
    values = (values.unflatten(-1, (-1, 32)) * torch.exp2(exponent.double())[..., None]).flatten(-2)
    scale = (exponent + 127).to(torch.uint8)
    return {"weight": packed(codes + 8 * (w <= 0)), "weight_scale": scale}, values


def mxfp8(w: torch.Tensor) -> Made:
    """A block's exponent = ceil(log2(amax / 448)), -127 at the least; e4m3 of w / 2^exponent."""
    blocks = w.float().unflatten(-1, (-1, 32))
    exponent = torch.log2(blocks.abs().amax(-1) / E4M3_MAX).clamp(min=-127).ceil()
    data = (w.unflatten(-1, (-1, 32)) * torch.exp2(-exponent)[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    data = data.to(torch.float8_e4m3fn)
    values = (data.double() * torch.exp2(exponent.double())[..., None]).flatten(-2)
    return {"weight": data.flatten(-2), "weight_scale": (exponent + 127).to(torch.uint8)}, values


def fp8(w: torch.Tensor, scale: torch.Tensor | None = None) -> Made:
    """One scale = amax / 448; the quotient is rounded in the weight's own dtype before it becomes e4m3."""
    scale = w.float().abs().amax() / E4M3_MAX if scale is None else scale
    data = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale": scale}, data.double() * scale.double()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even column's in the low nibble."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4

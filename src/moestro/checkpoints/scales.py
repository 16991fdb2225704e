"""Scales that cannot be meant: zero, NaN, infinite, negative. Kernels would turn them into zeros or NaN."""

from __future__ import annotations

import torch

from moestro.errors import FormatError

E4M3_NAN, E8M0_NAN = 0x7F, 0xFF
BYTES = {torch.float8_e4m3fn: E4M3_NAN, torch.float8_e8m0fnu: E8M0_NAN, torch.uint8: E8M0_NAN}


def check_global_scale(name: str, scale: torch.Tensor) -> None:
    """FormatError unless every value is positive and finite."""
    values = scale.float()
    good = (values > 0) & torch.isfinite(values)
    if not bool(good.all()):
        bad = values[~good].flatten()[:4].tolist() if values.ndim else [float(values)]
        raise FormatError(f"{name} must be positive and finite, got {', '.join(map(str, bad))}")


def check_block_scales(name: str, scale: torch.Tensor, codes: torch.Tensor | None = None) -> None:
    """FormatError for NaN, infinite or negative scales. Zeros stand for blocks whose scale underflowed, or of zeros;
    all of them zero is an error where `codes` (e2m1 pairs) are not.

    Of scales in one byte only the largest code is looked at: e4m3 keeps NaN at 0x7f and negative ones above it,
    e8m0 has NaN at 0xff.
    """
    if not scale.numel():
        return
    if scale.dtype in BYTES:
        limit = BYTES[scale.dtype]
        largest = int(scale.contiguous().view(torch.uint8).max())
        if largest == 0 and scale.dtype == torch.float8_e4m3fn and codes is not None:
            if bool((codes & 0x77).any()):
                raise FormatError(
                    f"{name} must hold a scale above 0, got 0 in all of {list(scale.shape)} beside weights that are not 0"
                )
            return
        if largest < limit:
            return
        found = scale.contiguous().view(torch.uint8).flatten()
        at = int((found >= limit).nonzero()[0])
        raise FormatError(
            f"{name} must hold scales that are numbers of at least 0, got code {int(found[at]):#04x} "
            f"({scale.dtype}) at {at} of {list(scale.shape)}"
        )
    check_global_scale(name, scale)

"""The number formats once more, from their definitions: tables and nearest neighbours. Slow and plain."""

from __future__ import annotations

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3_magnitudes() -> np.ndarray:
    """The 127 finite non-negative values of e4m3fn, by code: 4 exponent bits (bias 7), 3 mantissa bits."""
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


E4M3 = e4m3_magnitudes()


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the table's value nearest to each |x|, the even code of two that are equally near."""
    distance = np.abs(np.abs(np.asarray(x, dtype=np.float64))[..., None] - table)
    nearest = distance == distance.min(-1, keepdims=True)
    return np.where(nearest, np.arange(len(table)) % 2, 2).argmin(-1)


def round_e2m1(x: np.ndarray) -> np.ndarray:
    return np.copysign(E2M1[nearest(x, E2M1)], x)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    return np.copysign(E4M3[nearest(np.minimum(np.abs(x), 448), E4M3)], x)


def nvfp4(
    dense: torch.Tensor, global_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(e2m1 values [R, C], e4m3 scales [R, C/16], global scale) of dense [R, C], divided in float32."""
    x = dense.float().numpy().reshape(dense.shape[0], -1, 16)
    amax = np.abs(x).max(-1)  # [R, C/16]
    if global_scale is None:
        largest = amax.max(initial=0)
        g = np.float32(largest) / np.float32(2688) if largest > 0 else np.float32(1)
    else:
        g = np.float32(global_scale)
    scale = round_e4m3(amax / (np.float32(6) * g)).astype(np.float32)
    step = (scale * g)[..., None]
    ratio = np.divide(x, step, out=np.zeros_like(x), where=step > 0)
    return round_e2m1(ratio).reshape(dense.shape), scale, g


def from_nibbles(packed: torch.Tensor) -> np.ndarray:
    """e2m1 values [..., C] of bytes [..., C/2], nibble by nibble."""
    bytes_ = packed.cpu().numpy()
    codes = np.empty((*bytes_.shape[:-1], bytes_.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = bytes_ % 16
    codes[..., 1::2] = bytes_ // 16
    return np.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])

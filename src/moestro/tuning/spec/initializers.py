"""How a dynamic input gets its values while it is measured: (shape, dtype, device) -> tensor.

The six that FlashInfer's operations name, for TuningConfig(tensor_initializers=). torch is imported when one
is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["empty", "ones", "rand", "rand_scaled", "randn", "random_bytes", "zeros"]


def empty(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Whatever is in memory."""
    import torch

    return torch.empty(tuple(shape), dtype=dtype, device=device)


def zeros(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """All bits zero."""
    import torch

    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def ones(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """All 1, by way of float32: not every dtype can be filled directly."""
    import torch

    return torch.ones(tuple(shape), device=device).to(dtype)


def randn(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Normal values."""
    import torch

    return torch.randn(tuple(shape), device=device).to(dtype)


def rand(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Uniform values in [0, 1)."""
    import torch

    return torch.rand(tuple(shape), device=device).to(dtype)


def rand_scaled(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Uniform values in [-5, 5)."""
    import torch

    return (torch.rand(tuple(shape), device=device) * 10 - 5).to(dtype)


def random_bytes(shape: Sequence[int], dtype: Any, device: Any, generator: Any = None) -> Any:
    """Random bytes seen as `dtype`: for packed types that no number can be converted to, such as two FP4 values
    a byte. Exponent-only types (e8m0) get bytes of values near 1.
    """
    import torch

    low, high = (120, 135) if "e8m0" in str(dtype) else (0, 256)
    sized = (*tuple(shape), dtype.itemsize) if dtype.itemsize > 1 else tuple(shape)
    drawn = torch.randint(low, high, sized, dtype=torch.uint8, device=device, generator=generator)
    return drawn.view(dtype).reshape(tuple(shape))

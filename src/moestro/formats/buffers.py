"""Working memory that is taken once and used again for every chunk.

glibc gives freed memory back to the system, and new pages can cost more than what is computed in them: on a
virtual machine with slow page faults, temporaries made anew for each chunk took more time than the rest.
"""

from __future__ import annotations

from math import prod

import torch


class Buffers:
    """Tensors by name, uninitialised; a later one of the same name is in the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape; what the name held before is overwritten. One dtype to a name."""
        size, flat = prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)

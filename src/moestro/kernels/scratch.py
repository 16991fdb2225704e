"""Scratch memory: named tensors carved out of one byte buffer, so that a call allocates nothing of size.

A plan maps names to (shape, dtype); `plan_bytes` is what a workspace must hold, `carve` makes the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from moestro.errors import ShapeError

Plan = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
ALIGNMENT = 256  # bytes, what CUDA's own allocations have


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_bytes(plan: Plan) -> int:
    """Bytes of a workspace for the plan."""
    return sum(_aligned(prod(shape) * dtype.itemsize) for shape, dtype in plan.values())


def carve(plan: Plan, workspace: torch.Tensor | None, device: torch.device) -> dict[str, torch.Tensor]:
    """The plan's tensors, uninitialised, in the workspace (uint8), or in newly allocated memory without one.

    Raises ShapeError for a workspace that is too small.
    """
    need = plan_bytes(plan)
    if workspace is None:
        workspace = torch.empty(need, dtype=torch.uint8, device=device)
    elif workspace.numel() < need:
        raise ShapeError(f"workspace must have at least {need} bytes, got {workspace.numel()}")
    tensors, at = {}, 0
    for name, (shape, dtype) in plan.items():
        size = prod(shape) * dtype.itemsize
        tensors[name] = workspace[at : at + size].view(dtype).view(shape)
        at += _aligned(size)
    return tensors

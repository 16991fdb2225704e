"""Inputs of other sizes without values: what a runner is asked about, at sizes that nobody has called it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moestro.tuning.spec.keys import is_tensor, is_torch
from moestro.tuning.spec.profiles import OptimizationProfile

__all__ = ["inputs_like"]


def inputs_like(profile: OptimizationProfile, inputs: Sequence[Any]) -> list[Any]:
    """Inputs of the profile's shapes without values, for what looks at shapes alone. Raises TypeError for an input
    of which that cannot be made.
    """
    like = []
    for value, shape in zip(inputs, profile.get_opt_shapes(), strict=True):
        if not is_tensor(value) or tuple(value.shape) == tuple(shape):
            like.append(value)
        elif is_torch(value):
            import torch

            like.append(torch.empty(shape, dtype=value.dtype, device="meta"))
        elif hasattr(value, "new_empty"):
            like.append(value.new_empty(shape))
        else:
            raise TypeError(f"no {type(value).__name__} of shape {shape} can be made")
    return like

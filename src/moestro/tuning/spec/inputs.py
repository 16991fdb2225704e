"""Inputs of other sizes than the call's: with values, to measure on, and without, to ask a runner about.

Static inputs (weights) are used as they are. A dynamic one is made anew: by its initializer, else normal
values for floating types, and for others the given tensor's own values over and over (expert ids stay expert
ids). Probes then replace what matters. Inputs that are no torch tensors only need `new_empty(shape)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.initializers import random_bytes
from moestro.tuning.spec.keys import is_tensor, is_torch
from moestro.tuning.spec.specs import OptimizationProfile, Probe, TuningConfig

__all__ = ["inputs_like", "synthesise"]


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


def synthesise(
    config: TuningConfig,
    profile: OptimizationProfile,
    inputs: Sequence[Any],
    probe: Probe | None,
    seed: int,
) -> list[Any]:
    """Inputs of the profile's shapes. Raises TuningError where an input cannot be made or a probe's are not
    of them.
    """
    shapes = profile.get_opt_shapes()
    made = list(inputs)
    for i, value in enumerate(inputs):
        if is_tensor(value) and profile.is_dynamic(i):
            initializer = profile.tensor_initializers[i]
            if initializer is not None:
                made[i] = initializer(list(shapes[i]), value.dtype, getattr(value, "device", None))
            else:
                made[i] = _like(value, shapes[i], i, seed)
    if config.inputs_pre_hook is not None:
        made = list(config.inputs_pre_hook(made))
    if probe is not None:
        made = list(probe.make(made, profile, seed))
    _check(made, inputs, shapes, probe)
    return made


def _like(value: Any, shape: tuple[int, ...], index: int, seed: int) -> Any:
    if not is_torch(value):
        if hasattr(value, "new_empty"):
            return value.new_empty(shape)
        raise TuningError(
            f"input {index} of type {type(value).__name__} cannot be made for shape {shape}: "
            "give its DynamicTensorSpec a tensor_initializer"
        )
    import torch

    if value.device.type == "meta":
        return torch.empty(shape, dtype=value.dtype, device="meta")
    generator = torch.Generator(device=value.device).manual_seed(seed + index)
    if value.dtype.is_floating_point:
        dtype = value.dtype if value.dtype.itemsize > 1 else torch.float32
        try:
            return torch.randn(shape, dtype=dtype, device=value.device, generator=generator).to(value.dtype)
        except (NotImplementedError, RuntimeError):  # packed types, such as two FP4 values a byte
            return random_bytes(shape, value.dtype, value.device, generator)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.dtype.itemsize)
    again = value.detach()
    if words is not None and value.numel() and value.dtype is not words:
        # Some dtypes (uint16, bits8, ...) have no index_select: their values are moved as words of that width.
        return _like(again.view(words), shape, index, seed).view(value.dtype)
    if value.numel() == 0:
        return torch.zeros(shape, dtype=words or value.dtype, device=value.device).view(value.dtype)
    for d, size in enumerate(shape):
        if again.shape[d] != size:
            again = again.index_select(d, torch.arange(size, device=value.device) % again.shape[d])
    return again.clone()


def _check(made: list[Any], inputs: Sequence[Any], shapes: Sequence[Any], probe: Probe | None) -> None:
    who = f"probe {probe.name!r}" if probe is not None else "inputs_pre_hook"
    if len(made) != len(inputs):
        raise TuningError(f"{who} must give {len(inputs)} inputs, gave {len(made)}")
    for i, (new, old, shape) in enumerate(zip(made, inputs, shapes, strict=True)):
        if is_tensor(old) and is_tensor(new) and (tuple(new.shape) != shape or new.dtype != old.dtype):
            raise TuningError(
                f"input {i} must be {old.dtype} of shape {shape}, "
                f"{who} gave {new.dtype} of {tuple(new.shape)}"
            )

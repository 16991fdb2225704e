"""What travels with experts' weights: biases, calibrated scales of inputs, AWQ's scales of channels.

Read from the tensors that stand beside a projection's weight; see ExpertWeights for what each means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from moestro.errors import CheckpointWarning, FormatError

# a calibrated scale of the input -> whether it divides
INPUT_SCALES = {"input_scale": False, "input_global_scale": True}
Find = Callable[[int, str, str], torch.Tensor | None]  # (expert, projection, suffix)


def biases(
    find: Find, experts: list[int], projections: tuple[str, ...], prefix: str
) -> dict[str, torch.Tensor]:
    """gate_up_bias [L, 2I] and down_bias [L, H] of experts that have them."""
    *ups, down = projections
    found: dict[str, torch.Tensor] = {}
    for name, parts in (("gate_up_bias", ups), ("down_bias", [down])):
        rows = [[find(e, part, "bias") for part in parts] for e in experts]
        some = [row for row in rows if any(bias is not None for bias in row)]
        if not some:
            continue
        lost = [
            (e, p)
            for e, row in zip(experts, rows, strict=True)
            for p, b in zip(parts, row, strict=True)
            if b is None
        ]
        if lost:
            raise FormatError(f"{prefix}.{lost[0][0]}.{lost[0][1]}.bias is missing: others have one")
        found[name] = torch.stack([torch.cat([b for b in row if b is not None]) for row in rows])
    return found


def check_biases(
    found: dict[str, torch.Tensor],
    prefix: str,
    projections: tuple[str, ...],
    experts: list[int],
    stacked: bool,
) -> None:
    """FormatError where only one product of two has biases, or one is NaN or infinite."""
    joint = "_" if stacked else "."
    for name, projection in (("gate_up_bias", projections[0]), ("down_bias", projections[-1])):
        if found and name not in found:
            other = next(iter(found)).removesuffix("_bias")
            raise FormatError(f"{prefix}.{projection}{joint}bias is missing: {other} has one")
        if found and not bool((good := torch.isfinite(found[name]).all(-1)).all()):
            expert = experts[int((~good).nonzero()[0])]
            where = (
                f"{prefix}.{projection}_bias[{expert}]" if stacked else f"{prefix}.{expert}.{projection}.bias"
            )
            raise FormatError(f"{where} must be finite, got NaN or infinity")


def input_scales(
    find: Find, experts: list[int], projections: tuple[str, ...], prefix: str
) -> dict[str, torch.Tensor]:
    """gate_up_input_scale and down_input_scale [L], where they were calibrated.

    Gate and up have the same input: where their scales differ, the larger one loses no range. A scale of 0 (an
    expert that calibration never reached) becomes the largest of the other experts, with a warning. Raises
    FormatError for one that is missing, NaN, infinite or negative.
    """
    for suffix, divides in INPUT_SCALES.items():
        columns = [[find(e, p, suffix) for e in experts] for p in projections]
        there = [scale is not None for column in columns for scale in column]
        if not any(there):
            continue
        values = [
            _usable(
                [
                    _known(scale, f"{prefix}.{e}.{p}.{suffix}")
                    for e, scale in zip(experts, column, strict=True)
                ],
                [f"{prefix}.{e}.{p}.{suffix}" for e in experts],
                divides,
            )
            for p, column in zip(projections, columns, strict=True)
        ]
        *ups, down = values
        return {"gate_up_input_scale": torch.stack(ups).amax(0), "down_input_scale": down}
    return {}


def _known(scale: torch.Tensor | None, name: str) -> torch.Tensor:
    if scale is None:
        raise FormatError(f"{name} is missing: other projections have one")
    if scale.numel() != 1:
        raise FormatError(f"{name} must be one number, got {list(scale.shape)}")
    return scale.float().reshape(())


def _usable(scales: list[torch.Tensor], names: list[str], divides: bool) -> torch.Tensor:
    values = torch.stack(scales)
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise FormatError(f"{names[at]} must be positive and finite, got {float(values[at])}")
    zero = values == 0
    values = torch.where(zero, 0.0, 1 / values) if divides else values
    if bool(zero.all()):
        raise FormatError(f"{names[0]} must be positive, got 0, as of all experts of the layer")
    if bool(zero.any()):
        largest = values.amax()
        some = ", ".join(names[int(i)] for i in zero.nonzero().flatten()[:4])
        warnings.warn(
            f"{some} is 0 ({int(zero.sum())} of {len(names)}: calibration never reached these experts): "
            f"the largest scale of the others, {float(largest):.4g}, stands in",
            CheckpointWarning,
            stacklevel=2,
        )
        values = torch.where(zero, largest, values)
    return values


def pre_scale(find: Find, experts: list[int], projections: list[str], prefix: str) -> torch.Tensor | None:
    """float32 [C] (AWQ's pre_quant_scale of the input, the same for all these), or None where there is none.

    Raises FormatError where some have none, where values are not positive and finite, or where they differ:
    experts share their input, and ModelOpt's export gives them one scale.
    """
    found = {(e, p): find(e, p, "pre_quant_scale") for e in experts for p in projections}
    if all(scale is None for scale in found.values()):
        return None
    first: torch.Tensor | None = None
    for (e, p), scale in found.items():
        name = f"{prefix}.{e}.{p}.pre_quant_scale"
        if scale is None:
            raise FormatError(f"{name} is missing: other projections have one")
        value = checked_pre_scale(scale, name)
        first = value if first is None else first
        if not torch.equal(value, first):
            raise FormatError(
                f"{name} must equal that of the other projections with the same input (ModelOpt's export makes "
                f"them equal), got values that differ from those of {prefix}.{experts[0]}.{projections[0]}"
            )
    return first


def checked_pre_scale(scale: torch.Tensor, name: str) -> torch.Tensor:
    """float32 [C]; FormatError unless positive and finite."""
    value = scale.float().reshape(-1)
    if not bool(((value > 0) & torch.isfinite(value)).all()):
        raise FormatError(
            f"{name} must be positive and finite, got values from {value.min()} to {value.max()}"
        )
    return value

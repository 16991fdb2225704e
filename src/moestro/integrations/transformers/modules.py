"""What an experts module of Transformers holds, in the order of ours.

Transposed, interleaved, biased, without a gate: the decorator's flags say which (is_transposed, is_concatenated,
has_bias, has_gate). A parameter may be parametrised (PEFT adds an adapter's weights so) or FP8 with scales beside
it; what is read is what the module would compute with now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moestro.checkpoints.layouts import fp4_of_deepseek, fp8
from moestro.errors import BackendError
from moestro.formats import BF16, FormatTensor, FP8Block

FLAG = "is_concatenated"  # what the decorator gives every experts module
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a config


def experts_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of everything that runs through Transformers' experts interface."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, FLAG))


def is_share(module: Any) -> bool:
    """Whether a module has one rank's share of the experts.

    A Transformers that does not say so (5.17) counts the share in the module and all experts in its config.
    """
    said = getattr(module, "_is_expert_parallel", None)
    if said is not None:
        return bool(said)
    own = getattr(module, "num_experts", None)
    counts = [getattr(module.config, name, None) for name in COUNTS]
    return isinstance(own, int) and any(isinstance(count, int) and count > own for count in counts)


def up_name(module: Any) -> str:
    """The parameter of the first product."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def weight_names(module: Any) -> list[str]:
    """The parameters that the layer is made from, those of FP8 scales and biases included."""
    names = []
    for name in (up_name(module), "down_proj"):
        names += [name, f"{name}_scale_inv", f"{name}_bias"]
    return [name for name in names if isinstance(getattr(module, name, None), torch.Tensor)]


def sizes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of gate_up [E, 2I, H] and down [E, H, I] that the module's parameters have."""
    found = []
    for name in (up_name(module), "down_proj"):
        count, rows, columns = getattr(module, name).shape
        found.append((count, columns, rows) if module.is_transposed else (count, rows, columns))
    return found[0], found[1]


def matrices(module: Any) -> tuple[FormatTensor, FormatTensor]:
    """(gate_up [E, 2I, H], down [E, H, I]) as they are, gate rows before up rows; views where they can be."""
    return _matrix(module, up_name(module), True), _matrix(module, "down_proj", False)


def biases(module: Any) -> dict[str, torch.Tensor]:
    """gate_up_bias [E, 2I] and down_bias [E, H], where the module has them."""
    if not module.has_bias:
        return {}
    up: torch.Tensor = getattr(module, f"{up_name(module)}_bias").detach()
    if _alternates(module):
        up = torch.cat([up[:, 0::2], up[:, 1::2]], dim=1)
    return {"gate_up_bias": up.contiguous(), "down_bias": module.down_proj_bias.detach().contiguous()}


def from_matrices(module: Any, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """The module's own parameters from dense gate_up [E, 2I, H] and down [E, H, I]: what `matrices` reads."""
    if _alternates(module):
        gate, up = gate_up.chunk(2, dim=1)
        gate_up = torch.stack([gate, up], dim=2).flatten(1, 2)
    if module.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    return {up_name(module): gate_up.contiguous(), "down_proj": down.contiguous()}


def from_biases(module: Any, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """The module's own biases from ours."""
    if _alternates(module):
        gate_up = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1)
    return {f"{up_name(module)}_bias": gate_up.contiguous(), "down_proj_bias": down.contiguous()}


def _alternates(module: Any) -> bool:
    return bool(module.has_gate and not module.is_concatenated)


def _matrix(module: Any, name: str, first: bool) -> FormatTensor:
    weight: torch.Tensor = getattr(module, name).detach()
    scale = getattr(module, f"{name}_scale_inv", None)
    if isinstance(scale, torch.Tensor):
        return _scaled(module, name, weight, scale.detach())
    weight = weight.mT if module.is_transposed else weight
    if first and _alternates(module):
        weight = torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)
    return BF16(weight.contiguous())


def _scaled(module: Any, name: str, weight: torch.Tensor, scale: torch.Tensor) -> FormatTensor:
    if module.is_transposed or _alternates(module):
        raise BackendError(
            f"{type(module).__name__}.{name} is FP8 and transposed or interleaved: no place for that"
        )
    made = (fp4_of_deepseek if weight.dtype in (torch.int8, torch.uint8) else fp8)(weight, scale)
    if isinstance(made, FP8Block) and made.shape != tuple(weight.shape):
        raise BackendError(f"{type(module).__name__}.{name} has scales that do not fit it")
    return made

"""Experts whose own parameters were let go: packed weights are all that is held.

They come back, dequantised, where Transformers' own code needs them (another experts implementation, `restore`).
A state dict of the module holds the packed weights in the checkpoint layout, under "moestro."; a bf16 one holds the
module's own parameters. Both load again.
"""

from __future__ import annotations

from typing import Any

import torch

from moestro import formats
from moestro.errors import FormatError
from moestro.formats import BF16
from moestro.integrations.transformers.bound import LAYER, SIDE, Bound, bound_to, for_backend, make
from moestro.integrations.transformers.modules import from_biases, from_matrices, weight_names
from moestro.integrations.transformers.settings import Settings
from moestro.integrations.transformers.watch import Watch
from moestro.moe.weights import ExpertWeights

HOOKED = "_moestro_hooked"
PREFIX = "moestro."  # of packed tensors in a state dict


def pack(module: Any, settings: Settings) -> Bound:
    """Make the module's weights what they run as, and let its own parameters go."""
    found = make(module, settings)
    hold(module, found)
    return found


def hold(module: Any, found: Bound) -> None:
    """Let `found` be all there is of the module's experts."""
    for name in weight_names(module):
        if "parametrizations" in module._modules and name in module._modules["parametrizations"]:
            raise FormatError(
                f"{type(module).__name__}.{name} has an adapter: merge or remove it before packing"
            )
    for name in weight_names(module):
        del module._parameters[name]
    found.watch, found.given = None, True
    module.__dict__[LAYER] = found
    if HOOKED not in module.__dict__:
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
        module.__dict__[HOOKED] = True


def dense_parameters(module: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The module's parameters as packed (or quantised) weights stand for them, in the module's own order."""
    found = bound_to(module)
    assert found is not None
    w = found.weights.unpacked()
    dense = from_matrices(module, *w.dequantize(dtype))
    if w.gate_up_bias is not None and w.down_bias is not None:
        dense |= from_biases(module, w.gate_up_bias.to(dtype), w.down_bias.to(dtype))
    return dense


def restore(module: Any, dtype: torch.dtype | None = None) -> None:
    """Give the module its parameters back, dequantised; the packed weights stay, and serve until those are written."""
    found = bound_to(module)
    if found is None or not found.packed:
        return
    if found.weights.gate_up_pre_scale is not None:
        raise FormatError(
            f"{type(module).__name__} has weights with a scale of their input (AWQ), which Transformers' own experts "
            'have no place for: run them with experts_implementation="moestro"'
        )
    for name, value in dense_parameters(module, dtype or _dtype(module, found)).items():
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    found.watch = Watch(module, weight_names(module))


def _dtype(module: Any, found: Bound) -> torch.dtype:
    named = getattr(getattr(module, "config", None), "dtype", None)
    return found.weights.dense_dtype or (named if isinstance(named, torch.dtype) else torch.bfloat16)


# --- state dicts -----------------------------------------------------------------------------------------
def _save(module: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    found = bound_to(module)
    if found is None or not found.packed:
        return
    w = found.weights.unpacked()
    if w.format == "bf16":
        assert w.dense_dtype is not None
        state.update({f"{prefix}{name}": v for name, v in dense_parameters(module, w.dense_dtype).items()})
        return
    for part in ("gate_up", "down"):
        tensor = getattr(w, part)
        for piece in tensor.piece_names:
            state[f"{prefix}{PREFIX}{part}.{w.format}.{piece}"] = getattr(tensor, piece)
    for name in SIDE:
        if getattr(w, name) is not None:
            state[f"{prefix}{PREFIX}{name}"] = getattr(w, name)


def _load(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    found = bound_to(module)
    if found is None or not found.packed:
        return
    mine = {
        key.removeprefix(f"{prefix}{PREFIX}"): key for key in state if key.startswith(f"{prefix}{PREFIX}")
    }
    if mine:
        w = _from_state({name: state.pop(key) for name, key in mine.items()})
        module.__dict__[LAYER] = Bound(
            for_backend(w, found.activation, found.settings),
            found.activation,
            found.settings,
            None,
            None,
            True,
        )
        return
    names = list(own_names(module, found))
    given = {name: state.pop(f"{prefix}{name}") for name in names if f"{prefix}{name}" in state}
    if not given:
        return
    if missing := sorted(set(names) - set(given)):
        raise FormatError(
            f"the state dict has {', '.join(sorted(given))} for {prefix[:-1]}, but not {missing[0]}"
        )
    for name, value in given.items():
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    pack(module, found.settings)


def own_names(module: Any, found: Bound) -> list[str]:
    """The names of the module's own parameters."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names if found.weights.biased]


def _from_state(parts: dict[str, torch.Tensor]) -> ExpertWeights:
    pieces: dict[str, dict[str, torch.Tensor]] = {"gate_up": {}, "down": {}}
    side, format = {}, ""
    for name, tensor in parts.items():
        part, _, rest = name.partition(".")
        if part in pieces:
            format, _, piece = rest.partition(".")
            pieces[part][piece] = tensor
        else:
            side[name] = tensor
    cls: Any = formats.get(format) if format else BF16
    return ExpertWeights(cls(**pieces["gate_up"]), cls(**pieces["down"]), **side)  # type: ignore[arg-type]

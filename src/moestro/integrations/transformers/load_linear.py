"""Linear layers that a checkpoint has quantised: kept packed, or dequantised to the model's dtype (see linears.py).

Their tensors are recognised by the same table as experts' projections.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moestro.checkpoints.finding import CACHE_SCALES, is_quantised
from moestro.checkpoints.layouts import MODULES, Layout, recognise
from moestro.checkpoints.renamed import Renamed
from moestro.checkpoints.side import INPUT_SCALES, checked_pre_scale
from moestro.errors import FormatError
from moestro.formats import BF16, FormatTensor
from moestro.integrations.transformers.linears import put, settings_of, wanted, why_dense
from moestro.integrations.transformers.load_experts import Report, device_of, dtype_of
from moestro.integrations.transformers.modules import experts_modules
from moestro.integrations.transformers.settings import Settings

log = logging.getLogger("moestro")


@dataclass(frozen=True)
class QuantisedLinear:
    """A Linear layer whose weight is read here: its name in the model, its row, its tensors by suffix."""

    name: str
    row: Layout
    tensors: dict[str, str]


def quantised_linears(model: Any, tensors: Renamed) -> list[QuantisedLinear]:
    """The modules with a `weight` that the checkpoint holds quantised, other than experts.

    Raises FormatError that names a tensor that has no place.
    """
    experts = tuple(f"{name}." for name, _ in experts_modules(model))
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.startswith(experts):
            continue
        module, _, suffix = name.rpartition(".")
        groups.setdefault(module, {})[suffix] = name
    modules = dict(model.named_modules())
    found, kv = [], set()
    for name, pieces in groups.items():
        kv |= {suffix for suffix in pieces if suffix in CACHE_SCALES}
        pieces = {suffix: n for suffix, n in pieces.items() if suffix not in CACHE_SCALES}
        if not pieces or not is_quantised(pieces, tensors):
            continue
        if name not in modules and _is_beyond(model, modules, name):
            continue  # Transformers reports such tensors, or passes over them, as for a dense checkpoint
        if not isinstance(modules.get(name), torch.nn.Linear):
            raise FormatError(
                f"{next(iter(pieces.values()))} is quantised, but {name} is no Linear layer of the model"
            )
        dtypes = {suffix: tensors.info(n)[0] for suffix, n in pieces.items()}
        found.append(QuantisedLinear(name, recognise(name, dtypes, MODULES), pieces))
    if kv:
        log.warning(
            "%s of the key-value cache are not used: it stays in the model's dtype", ", ".join(sorted(kv))
        )
    return found


def _is_beyond(model: Any, modules: Mapping[str, torch.nn.Module], name: str) -> bool:
    """Whether a module is one that the model is not made with: a layer after its last (a checkpoint's prediction of
    further tokens), or what its class says to ignore.
    """
    spelt = (f"{name}.", f"{name.removeprefix(model.base_model_prefix + '.')}.")
    if any(re.search(p, s) for p in model._keys_to_ignore_on_load_unexpected or () for s in spelt):
        return True
    parts = name.split(".")
    above = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
    return isinstance(modules[".".join(parts[:above])], torch.nn.ModuleList) and parts[above].isdigit()


def load_linear(model: Any, linears: list[QuantisedLinear], tensors: Renamed) -> list[Report]:
    """Fill the quantised Linear layers of a model."""
    tied = bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    made = []
    for linear in linears:
        module = model.get_submodule(linear.name)
        device, dtype = device_of(model, linear.name), dtype_of(model)
        where = f"{tensors.file_of(next(iter(linear.tensors.values())))}: {linear.name}"
        weight = linear.row.read(where, {s: tensors[linear.tensors[s]] for s in linear.row.pieces}).to(device)
        if tuple(weight.shape) != (module.out_features, module.in_features):
            raise FormatError(
                f"{linear.name} must be [{module.out_features}, {module.in_features}], got {list(weight.shape)}"
            )
        pre_scale = None
        if (name := linear.tensors.get("pre_quant_scale")) is not None:
            pre_scale = checked_pre_scale(tensors[name], name).to(device)
        is_head = tied and module is model.get_output_embeddings()
        side = {"pre_scale": pre_scale, "input_scale": _input_scale(linear, tensors, device)}
        made.append(_fill(model, linear, weight, dtype, side, wanted(model) if not is_head else False))
    return made


def _fill(
    model: Any,
    linear: QuantisedLinear,
    weight: FormatTensor,
    dtype: torch.dtype,
    side: Any,
    mode: bool | None,
) -> Report:
    """One layer: packed where `mode` (moestro_linear) and the core allow it; else dense, in torch's Linear."""
    settings = settings_of(model)
    reason = why_dense(weight, weight.device, settings)
    if mode and reason is not None and (values := _as_bf16(weight, settings)) is not None:
        weight, reason = values, None
    if mode or (mode is None and reason is None):
        done = put(model, linear.name, weight, settings, dtype=dtype, **side)
        return Report(linear.name, linear.row.name, done.format, done.on, done.nbytes)
    module = model.get_submodule(linear.name)
    dense = weight.dequantize(torch.float32)
    if side["pre_scale"] is not None:
        dense *= side["pre_scale"]
    module.weight = torch.nn.Parameter(dense.to(dtype), requires_grad=False)
    return Report(linear.name, linear.row.name, "dequantised", "torch", module.weight.nbytes)


def _as_bf16(weight: FormatTensor, settings: Settings) -> BF16 | None:
    """The weight in bf16, where that has its values and the core runs it."""
    dense = weight.dequantize(torch.float32)
    values = BF16(dense.to(torch.bfloat16))
    same = why_dense(values, weight.device, settings) is None and torch.equal(values.data.float(), dense)
    return values if same else None


def _input_scale(
    linear: QuantisedLinear, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """The calibrated global scale of NVFP4 activations, where the checkpoint has a usable one."""
    for suffix, divides in INPUT_SCALES.items():
        if "NVFP4" not in linear.row.name.upper() or (name := linear.tensors.get(suffix)) is None:
            continue
        scale = tensors[name].float().reshape(()).to(device)
        if not bool(torch.isfinite(scale)) or float(scale) <= 0:
            raise FormatError(f"{name} must be positive and finite, got {float(scale)}")
        return 1 / scale if divides else scale
    return None

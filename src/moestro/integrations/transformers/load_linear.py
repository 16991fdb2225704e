"""Linear layers that a checkpoint has quantised: dequantised to the model's dtype, for Transformers' own Linear.

Their tensors are recognised by the same table as experts' projections.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moestro.checkpoints.finding import CACHE_SCALES, is_quantised
from moestro.checkpoints.layouts import MODULES, Layout, recognise
from moestro.checkpoints.renamed import Renamed
from moestro.checkpoints.side import checked_pre_scale
from moestro.errors import FormatError
from moestro.integrations.transformers.load_experts import Report, device_of, dtype_of
from moestro.integrations.transformers.modules import experts_modules

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


def load_linear(
    model: Any, linears: list[QuantisedLinear], tensors: Mapping[str, torch.Tensor]
) -> list[Report]:
    """Fill the quantised Linear layers of a model."""
    made = []
    for linear in linears:
        module = model.get_submodule(linear.name)
        device, dtype = device_of(model, linear.name), dtype_of(model)
        weight = linear.row.read(linear.name, {s: tensors[linear.tensors[s]] for s in linear.row.pieces}).to(
            device
        )
        if tuple(weight.shape) != (module.out_features, module.in_features):
            raise FormatError(
                f"{linear.name} must be [{module.out_features}, {module.in_features}], got {list(weight.shape)}"
            )
        dense = weight.dequantize(torch.float32)
        if (name := linear.tensors.get("pre_quant_scale")) is not None:
            dense *= checked_pre_scale(tensors[name], name).to(device)
        module.weight = torch.nn.Parameter(dense.to(dtype), requires_grad=False)
        made.append(Report(linear.name, linear.row.name, "dequantised", "torch", module.weight.nbytes))
    return made

"""The experts of a checkpoint into a model's modules, layer by layer: read, checked, repacked, and nothing else held."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from moestro import formats
from moestro.checkpoints.experts import Experts
from moestro.checkpoints.scheme import Scheme
from moestro.errors import CheckpointWarning, FormatError
from moestro.formats import FormatTensor
from moestro.integrations.transformers.bound import (
    NAME_IN_MODEL,
    Bound,
    backend_for,
    for_backend,
    module_activation,
    named_errors,
)
from moestro.integrations.transformers.modules import up_name
from moestro.integrations.transformers.packed import hold
from moestro.integrations.transformers.settings import Settings
from moestro.machine import bytes_text
from moestro.moe.weights import ExpertWeights

log = logging.getLogger("moestro")


@dataclass(frozen=True)
class Report:
    """A line of what runs where."""

    name: str
    layout: str  # on disk
    format: str  # in memory
    backend: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name}: {self.layout} -> {self.format} on {self.backend}, {bytes_text(self.nbytes)}"


Expert = tuple[FormatTensor, FormatTensor]  # gate_up, down
Sizes = tuple[tuple[int, ...], tuple[int, ...]]  # of gate_up and down, as the model's config has them


def load_experts(
    model: Any,
    modules: Mapping[str, Sizes],
    tensors: Mapping[str, torch.Tensor],
    settings: Settings,
    scheme: Scheme,
) -> list[Report]:
    """Fill a model's experts modules, by name; a progress bar and a report of each."""
    made = []
    for name in transformers_logging.tqdm(list(modules), desc="Packing experts", disable=len(modules) < 2):
        module = model.get_submodule(name)
        module.__dict__[NAME_IN_MODEL] = name
        with named_errors(module):
            experts = Experts(tensors, name, num_experts=module.num_experts)
            first = next(iter(experts))
            _check(module, name, experts, first, modules[name])
            _compare(scheme, name, experts, first)
            try:
                made.append(
                    load_module(module, name, experts, settings, device_of(model, name), dtype_of(model))
                )
            except FormatError as error:
                if (where := experts.first_nan()) is not None:
                    raise FormatError(f"{where} must hold no NaN ({error})") from error
                raise
    return made


def load_module(
    module: Any,
    name: str,
    experts: Experts,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
) -> Report:
    """One module's experts."""
    side = experts.side_tensors()
    for suffix in experts.not_used():
        log.warning("%s: %s is not used, activations stay in their own dtype", name, suffix)
    activation = module_activation(module)
    source = _On(experts, device, settings)
    first = next(iter(source))
    one = ExpertWeights(*(type(t).stack([t]) for t in first))
    backend = backend_for(one, activation, settings)
    w = ExpertWeights.from_experts(
        source,
        backend,
        dtype=settings.options.get("dtype") or dtype,
        input_format=settings.options.get("input_format"),
        **_moved(side, device),
    )
    found = Bound(for_backend(w, activation, settings), activation, settings, None)
    hold(module, found)
    return Report(name, experts.layout, w.format, backend, w.nbytes)


class _On:
    """Experts on their device, quantised where that was asked for."""

    def __init__(self, experts: Experts, device: torch.device, settings: Settings) -> None:
        self._experts, self._device, self._settings = experts, device, settings

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Any:
        for gate_up, down in self._experts:
            yield self._put(gate_up), self._put(down)

    def _put(self, tensor: FormatTensor) -> FormatTensor:
        here = tensor.to(self._device)
        if self._settings.quantises and here.format == "bf16":
            return formats.get(str(self._settings.format)).quantize(here.dequantize(here.data.dtype))  # type: ignore[attr-defined]
        return here


def _moved(side: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in side.items()}


def _check(module: Any, name: str, experts: Experts, first: Expert, wanted: Sizes) -> None:
    """What the module's config and the checkpoint must agree in."""
    if experts.gated != module.has_gate:
        words = "a gate" if experts.gated else "no gate"
        raise FormatError(
            f"{name} must have {up_name(module)}, but its experts in the checkpoint have {words}"
        )
    biased = "gate_up_bias" in experts.biases()
    if biased != module.has_bias:
        has, had = ("biases", "none") if module.has_bias else ("no biases", "some")
        raise FormatError(f"{name} must have {has}, but its experts in the checkpoint have {had}")
    for part, (_, *size), tensor in zip(("gate_up", "down"), wanted, first, strict=True):
        if list(tensor.shape) != size:
            raise FormatError(
                f"{part} of an expert of {name} must be {size} as the model's config says, got {list(tensor.shape)} "
                f"in the checkpoint ({experts.layout})"
            )


def _compare(scheme: Scheme, name: str, experts: Experts, first: Expert) -> None:
    """A warning where the config says another format than the tensors have, which are read as what they are."""
    meant = scheme.format_of(name)
    stored = {part.format for part in first} - {"bf16"}
    if meant is not None and stored and stored != {meant}:
        warnings.warn(
            f"the checkpoint's config says {scheme} ({meant}), the experts of {name} are {experts.layout}: they are "
            "read as what they are",
            CheckpointWarning,
            stacklevel=2,
        )


def device_of(model: Any, name: str) -> torch.device:
    """Where the neighbours of a module are: its parent's parameters, or those above."""
    parts = name.split(".")
    for n in range(len(parts) - 1, -1, -1):
        parent = model.get_submodule(".".join(parts[:n]))
        for parameter in parent.parameters():
            device: torch.device = parameter.device
            if device.type != "meta":
                return device
    return torch.device("cpu")


def dtype_of(model: Any) -> torch.dtype:
    """The dtype that the model computes in."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16

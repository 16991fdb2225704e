"""Quantised checkpoints through from_pretrained: experts stay packed, and are never dequantised as a whole.

Before Transformers reads weights, the parameters of all experts modules and of all Linear layers that the checkpoint
has quantised are taken out of the model; Transformers loads the rest as ever, and afterwards these are read here,
straight from the mapped files, one expert after the other. What a tensor is, its own dtype and neighbours say
(checkpoints/layouts.py); the config is read for what was meant, and for an algorithm that nobody here knows.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moestro.checkpoints.files import INDEX, Safetensors
from moestro.checkpoints.renamed import Renamed
from moestro.checkpoints.scheme import METHODS, parse
from moestro.errors import BackendError, FormatError
from moestro.integrations.transformers.bound import LAYER
from moestro.integrations.transformers.linears import (
    ASKED,
    pack_linears,
    settings_of,
    unpack_linears,
    wanted,
)
from moestro.integrations.transformers.load_experts import Report, Sizes, load_experts
from moestro.integrations.transformers.load_linear import QuantisedLinear, load_linear, quantised_linears
from moestro.integrations.transformers.modules import experts_modules, sizes, weight_names
from moestro.integrations.transformers.packed import restore
from moestro.integrations.transformers.saving import checkpoint_state
from moestro.integrations.transformers.settings import REGISTERED, of_model

log = logging.getLogger("moestro")
MODELOPT = "modelopt"


class MoestroQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's quantisation config as it stands there."""

    def __init__(self, quant_method: str = MODELOPT, **raw: Any) -> None:
        self.quant_method = quant_method
        self.raw = {"quant_method": quant_method, **raw}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return dict(self.raw)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing is a default."""
        return self.to_dict()


class MoestroQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a checkpoint whose experts moestro runs."""

    requires_calibration = False

    def __init__(self, quantization_config: MoestroQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.scheme = parse(quantization_config.raw)
        self._tensors: Renamed | None = None
        self._experts: dict[str, Sizes] = {}
        self._linears: list[QuantisedLinear] = []
        self.report: list[Report] = []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if of_model(model) is None and any(experts_modules(model)):
            raise BackendError(
                f"a {self.scheme} checkpoint loads with experts_implementation={'|'.join(REGISTERED) or 'moestro'!r}, "
                f"got {getattr(model.config, '_experts_implementation', None)!r}; "
                "moestro.integrations.transformers.register() makes it known"
            )
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        if not files:
            raise FormatError(
                f"a {self.scheme} checkpoint must be of safetensors files, got {checkpoint_files}"
            )
        self._tensors = _renamed(model, _opened(files))
        self._experts = {name: sizes(module) for name, module in experts_modules(model)}
        self._linears = quantised_linears(model, self._tensors)
        for name, module in experts_modules(model):
            if not self._tensors.under(name):
                raise FormatError(f"the checkpoint holds no experts for {name}")
            for parameter in weight_names(module):
                del module._parameters[parameter]
            module._is_hf_initialized = True  # there is nothing for Transformers to initialise
        for linear in self._linears:
            module = model.get_submodule(linear.name)
            del module._parameters["weight"]
            module._is_hf_initialized = True
        ours = {rf"{_named(model, name)}\." for name in self._experts}
        ours |= {rf"{_named(model, linear.name)}\.(?!bias$)" for linear in self._linears}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ours}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._tensors is not None
        self.report = load_experts(model, self._experts, self._tensors, settings_of(model), self.scheme)
        self.report += load_linear(model, self._linears, self._tensors)
        self.report += pack_linears(model) if wanted(model) else []
        self._tensors = None
        for line in self.report:
            log.info("%s", line)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """model.dequantize(): experts and Linear layers get their own parameters; moestro runs the experts as bf16."""
        for _, module in experts_modules(model):
            if not weight_names(module):
                restore(module, dtype)
            module.__dict__.pop(LAYER, None)
        unpack_linears(model, dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The experts in the layout of the checkpoint that config.json will describe."""
        state, raw = checkpoint_state(model, self.quantization_config.raw)
        self.quantization_config.raw = raw
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register_modelopt() -> None:
    """Make Transformers know ModelOpt's checkpoints, unless it does already."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(MODELOPT, MoestroQuantConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(MODELOPT, MoestroQuantizer)


def quantizer_for(config: Any, asked: Any, device_map: Any) -> MoestroQuantizer | None:
    """Our quantiser, where the experts of this config are ours and the checkpoint is quantised in a way we read."""
    configs = [config, config.get_text_config(decoder=True)]
    ours = any(getattr(c, "_experts_implementation", None) in REGISTERED for c in configs)
    if not ours and not ASKED.get():
        return None
    if asked is not None and getattr(asked, "dequantize", False):
        return None  # to be dequantised by Transformers: dense experts, packed afterwards
    raw = next((q for c in configs if (q := getattr(c, "quantization_config", None)) is not None), None)
    raw = raw.to_dict() if isinstance(raw, QuantizationConfigMixin) else raw
    if raw is None or raw.get("quant_method", MODELOPT if "quantization" in raw else None) not in METHODS:
        return None
    if raw.get("dequantize"):
        return None
    made = MoestroQuantConfig.from_dict({"quant_method": MODELOPT, **raw})
    if asked is not None:
        log.warning(
            "quantization_config=%s is not used: the checkpoint has its own (%s)",
            asked,
            made.raw["quant_method"],
        )
    config.quantization_config = made
    return MoestroQuantizer(made, pre_quantized=True)


def _opened(files: list[str]) -> Safetensors:
    """The checkpoint's files; by their index where they have one, which says of a tensor in two files which it is."""
    folders = {Path(file).parent for file in files}
    if len(folders) == 1 and (folder := folders.pop()).joinpath(INDEX).is_file():
        by_index = Safetensors(folder)
        if {by_index.file_of(name) for name in by_index} == {Path(file) for file in files}:
            return by_index
    return Safetensors(files)


def _named(model: Any, name: str) -> str:
    """A pattern of a module's name, with the base model's prefix and without: as the checkpoint may have it."""
    base = re.escape(model.base_model_prefix)
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    return rf"^(?:{base}\.)?{re.escape(bare)}" if base else rf"^{re.escape(name)}"


def _renamed(model: Any, tensors: Safetensors) -> Renamed:
    """The checkpoint's tensors under the model's names."""
    renamings = [w for w in get_model_conversion_mapping(model) if isinstance(w, WeightRenaming)]
    modules = {name for name, _ in model.named_modules()}
    base = model.base_model_prefix
    names: dict[str, str] = {}
    for original in tensors:
        renamed, _ = rename_source_key(original, renamings, [])
        names[_fitted(renamed, base, modules)] = original
    return Renamed(tensors, names)


def _fitted(name: str, base: str, modules: set[str]) -> str:
    """The name with or without the base model's prefix, as the model has it."""
    for candidate in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
        parts = candidate.split(".")
        if any(".".join(parts[:n]) in modules for n in range(len(parts) - 1, 2, -1)) or parts[0] in modules:
            return candidate
    return name


def mark_saved(model: Any) -> None:
    """Let save_pretrained write a quantised checkpoint, and the config say so."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "quantization_config", None) is not None:
        return
    made = MoestroQuantConfig(quant_algo="W4A16_NVFP4")
    model.hf_quantizer, config.quantization_config = MoestroQuantizer(made), made

"""The places in Transformers where a model with our experts needs more than its interface offers; put in by register().

Which quantiser loads a checkpoint (quantizer.py); what happens when a model is loaded (its experts are packed then,
and not in the first call) or when an experts implementation is chosen (an error there, and not minutes later); and
packed experts that another implementation is to run get their parameters back.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.utils.hub import cached_file

from moestro.checkpoints.scheme import raw_scheme
from moestro.errors import BackendError
from moestro.integrations.transformers.bound import NAME_IN_MODEL, bound_to, module_activation, named_errors
from moestro.integrations.transformers.linears import ASKED, pack_linears, wanted
from moestro.integrations.transformers.modules import experts_modules, weight_names
from moestro.integrations.transformers.packed import pack, restore
from moestro.integrations.transformers.quantizer import MoestroQuantizer, mark_saved, quantizer_for
from moestro.integrations.transformers.settings import REGISTERED, Settings, of_model

log = logging.getLogger("moestro")
DONE = "_moestro"
MODELOPT_FILE = "hf_quant_config.json"
# Of from_pretrained: where a checkpoint's files are.
HUB_KEYWORDS = (
    "subfolder",
    "revision",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "token",
    "repo_type",
)
# Experts of quantisers that do not ask the interface: choosing us for them would be ignored.
DEAF = ("Mxfp4GptOssExperts",)


def install() -> None:
    """Put the hooks in, once."""
    _wrap(modeling_utils, "get_hf_quantizer", _get_hf_quantizer)
    _wrap(modeling_utils.PreTrainedModel, "_finalize_model_loading", _finalize, static=True)
    _wrap(modeling_utils.PreTrainedModel, "get_correct_experts_implementation", _choose)
    _wrap(ExpertsInterface, "get_interface", _get_interface)
    _wrap_class_method(PreTrainedConfig, "get_config_dict", _get_config_dict)
    _wrap_class_method(modeling_utils.PreTrainedModel, "from_pretrained", _from_pretrained)


def _wrap(owner: Any, name: str, ours: Callable[..., Any], static: bool = False) -> None:
    theirs = getattr(owner, name, None)
    if theirs is None:
        log.warning(
            "this Transformers has no %s.%s: quantised checkpoints load by moestro.load only", owner, name
        )
        return
    if getattr(theirs, DONE, False):
        return
    wrapped = functools.wraps(theirs)(functools.partial(ours, theirs)) if static else _method(theirs, ours)
    setattr(wrapped, DONE, True)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _method(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    return wrapped


def _wrap_class_method(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    theirs = getattr(owner, name).__func__
    if not getattr(theirs, DONE, False):
        wrapped = _method(theirs, ours)
        setattr(wrapped, DONE, True)
        setattr(owner, name, classmethod(wrapped))


def _from_pretrained(
    theirs: Any, cls: Any, *args: Any, moestro_linear: bool | None = None, **kwargs: Any
) -> Any:
    """Transformers' own, with a keyword of ours; a call inside another one has the outer one's."""
    if moestro_linear is None:
        return theirs(cls, *args, **kwargs)
    token = ASKED.set(Settings(linear=moestro_linear).linear)
    try:
        return theirs(cls, *args, **kwargs)
    finally:
        ASKED.reset(token)


def _get_config_dict(theirs: Any, cls: Any, path: Any, **kwargs: Any) -> Any:
    """A checkpoint whose config.json says nothing of its quantisation may have ModelOpt's hf_quant_config.json."""
    where = {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}
    config, rest = theirs(cls, path, **kwargs)
    if config and config.get("quantization_config") is None and kwargs.get("gguf_file") is None:
        beside = _beside(str(path), {**where, "_commit_hash": config.get("_commit_hash")})
        if beside is not None:
            config["quantization_config"] = raw_scheme(beside.parent)
    return config, rest


def _beside(path: str, where: dict[str, Any]) -> Path | None:
    """ModelOpt's file of a folder, or of a repository on the Hub (in its cache, or fetched); None without one."""
    if os.path.isfile(path):
        return None
    silent = ("missing_entries", "gated_repo", "connection_errors")
    found = cached_file(
        path, MODELOPT_FILE, **where, **{f"_raise_exceptions_for_{kind}": False for kind in silent}
    )
    return None if found is None else Path(found)


def _get_hf_quantizer(
    theirs: Any, config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any
) -> Any:
    """Our quantiser for a checkpoint whose experts are to be ours; theirs for all others."""
    if (ours := quantizer_for(config, quantization_config, device_map)) is not None:
        return ours, config, device_map
    return theirs(config, quantization_config, device_map, *args, **kwargs)


def _finalize(theirs: Any, model: Any, load_config: Any, loading_info: Any) -> Any:
    """After the weights are there: pack the experts, a layer at a time, and Linear layers where that was asked for."""
    result = theirs(model, load_config, loading_info)
    chosen = of_model(model)
    if chosen is not None and not isinstance(load_config.hf_quantizer, MoestroQuantizer):
        _, settings = chosen
        for name, module in experts_modules(model):
            module.__dict__[NAME_IN_MODEL] = name
            if settings.release and _loaded(module):
                found = pack(module, settings)
                if found.weights.format != "bf16":
                    mark_saved(model)
    if wanted(model) and not isinstance(load_config.hf_quantizer, MoestroQuantizer):
        report = pack_linears(model)
        for line in report:
            log.info("%s", line)
    return result


def _loaded(module: Any) -> bool:
    return all(getattr(module, name).device.type not in ("meta",) for name in weight_names(module))


def _choose(theirs: Any, model: Any, requested: str | None) -> Any:
    """Check a model's experts where one of our implementations is chosen for it."""
    result = theirs(model, requested)
    if result in REGISTERED:
        for name, module in model.named_modules():
            if type(module).__name__ in DEAF:
                raise BackendError(
                    f"{type(module).__name__} (at {name}) never asks for an experts implementation; load the model "
                    f'with from_pretrained(..., experts_implementation="{result}")'
                )
        for name, module in experts_modules(model):
            module.__dict__[NAME_IN_MODEL] = name
            if bound_to(module) is None and weight_names(module):
                with named_errors(module):
                    module_activation(module)
    return result


def _get_interface(theirs: Any, interface: Any, name: str, default: Any) -> Any:
    """Packed experts get their parameters back before another implementation runs them."""
    chosen = theirs(interface, name, default)
    if name in REGISTERED or torch.compiler.is_compiling():
        return chosen
    return functools.partial(_with_parameters, chosen)


def _with_parameters(theirs: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    found = bound_to(module)
    if found is not None and found.packed:
        log.warning(
            "%s (at %s): packed %s experts are dequantised for another implementation than moestro",
            type(module).__name__,
            module.__dict__.get(NAME_IN_MODEL, "?"),
            found.weights.format,
        )
        x = args[0] if args else kwargs.get("hidden_states")
        restore(module, x.dtype if isinstance(x, torch.Tensor) else None)
    return theirs(module, *args, **kwargs)

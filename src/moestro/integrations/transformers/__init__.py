"""Transformers' experts on Moestro: `experts_implementation="moestro"` (Transformers 5.7 and newer).

    import moestro.integrations.transformers as mt
    mt.register()                                                                       # once
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moestro")
    mt.quantize_experts(model, "nvfp4")                                                 # for a bf16 one, if wanted

A checkpoint with quantised experts (ModelOpt, compressed-tensors, gpt-oss' MXFP4, DeepSeek's FP8) is loaded packed,
straight from its files. A dense one is packed after loading, a layer at a time, and the module's own parameters are
let go; register(release=False) keeps them, for training, adapters and weight sync. A model that was made by hand
keeps its parameters: its layers are made at the first call (or by `prepare`), and made again when the weights were
written since (watch.py says what is seen and what is not; `refresh` drops the layers).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from moestro.errors import BackendError
from moestro.integrations import no_transformers

try:
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise no_transformers(error) from error

from moestro.integrations.transformers import forward, hooks
from moestro.integrations.transformers.bound import LAYER, NAME_IN_MODEL, bind, bound_to
from moestro.integrations.transformers.linears import EXCLUDED, quantise
from moestro.integrations.transformers.modules import experts_modules, weight_names
from moestro.integrations.transformers.packed import pack, restore
from moestro.integrations.transformers.quantizer import (
    mark_saved,
    register_modelopt,
)
from moestro.integrations.transformers.settings import (
    NAME,
    REGISTERED,
    SETTINGS,
    Settings,
    need_quantised,
    of_model,
)
from moestro.machine import bytes_text
from moestro.moe.layer import FusedMoE

__all__ = [
    "LAYER",
    "prepare",
    "quantize_experts",
    "quantize_linear",
    "refresh",
    "register",
    "restore_experts",
]

# Where configs say how many experts a token goes to.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k",
    "router_top_k",
    "num_selected_experts",
    "num_activated_experts",
    "num_experts_per_layer",
    "experts_top_k",
    "ffn_moe_top_k",
    "moe_router_topk",
)


def register(
    name: str = NAME,
    *,
    format: str | None = None,
    max_num_tokens: int = 8192,
    release: bool = True,
    moestro_linear: bool | None = None,
    **options: Any,
) -> None:
    """Make an experts implementation known to Transformers under `name`.

    format: of the weights; None (or "bf16"): as the model or the checkpoint has them. max_num_tokens: the largest
    batch of a layer; longer ones are cut. release: whether from_pretrained lets go of a dense model's own
    parameters once they are packed. moestro_linear: which Linear layers run on Moestro: None those that the
    checkpoint has quantised, True all that the core can run, in their own dtype, False none; from_pretrained takes
    the keyword, too. options: keywords of FusedMoE (backend=, input_format=, deterministic=, ...); input_format is
    that of quantised Linear layers, too.

    Raises FormatError, ShapeError or TypeError for what no layer could have.
    """
    settings = Settings(format, max_num_tokens, release, options, moestro_linear)
    called = functools.partial(forward.experts_forward, name)
    functools.update_wrapper(called, forward.experts_forward)
    setattr(called, SETTINGS, settings)
    ExpertsInterface.register(name, called)
    for interface in _other_interfaces():
        interface.register(name, called)
    hooks.install()
    register_modelopt()


def _other_interfaces() -> list[Any]:
    """FP8 models on a GPU ask a registry of their own."""
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return []
    return [FP8ExpertsInterface]


def prepare(model: torch.nn.Module, top_k: int | None = None, **settings: Any) -> list[FusedMoE]:
    """Make the layers of all experts modules of a model now, and not at their first calls; for tuning ahead.

    top_k: by default what the modules' configs say. settings: as in register(); by default those of the
    implementation that the model has. Raises BackendError where no config says top_k.
    """
    chosen = _settings(model, settings)
    layers = []
    for name, module in experts_modules(model):
        module.__dict__[NAME_IN_MODEL] = name
        k = 1 if getattr(module, "has_post_expert_norm", False) else top_k or _top_k(model, module, name)
        layers.append(bind(module, int(k), chosen))
    return layers


def _settings(model: torch.nn.Module, given: dict[str, Any]) -> Settings:
    if not given:
        found = of_model(model)
        return found[1] if found else REGISTERED.get(NAME, Settings())
    names = ("format", "max_num_tokens", "release")
    own = {name: given[name] for name in names if name in given}
    return Settings(**own, options={name: v for name, v in given.items() if name not in names})


def _top_k(model: torch.nn.Module, module: Any, name: str) -> int:
    """From the module, its neighbours (the router) and the configs, under whatever name."""
    around = [module]
    parts = name.split(".")
    for n in range(len(parts) - 1, max(-1, len(parts) - 3), -1):
        parent = model.get_submodule(".".join(parts[:n]))
        around += [parent, *parent.children()]
    configs: list[Any] = [getattr(m, "config", None) for m in (module, model)]
    configs += [c.get_text_config(decoder=True) for c in configs if hasattr(c, "get_text_config")]
    for place in (*around, *configs):
        for key in TOP_K_NAMES:
            value = getattr(place, key, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise BackendError(
        f"top_k must be given: {type(module).__name__} (at {name}) and its config say it under no name that moestro "
        f"knows ({', '.join(TOP_K_NAMES[:4])}, ...); pass prepare(model, top_k=...)"
    )


def quantize_experts(model: torch.nn.Module, format: str = "nvfp4", **options: Any) -> list[str]:
    """Quantise and pack the experts of a loaded model, a layer at a time; their own parameters are let go.

    The model runs them from then on (its experts implementation becomes "moestro"), and save_pretrained writes a
    quantised checkpoint. options: keywords of register(). Returns a line for each layer. At most the model and one
    layer are in memory. Raises FormatError for an unknown format, ShapeError for sizes that it cannot block.
    """
    need_quantised(format)
    chosen = of_model(model)
    if chosen is None:
        if NAME not in REGISTERED:
            register(**options)
        chosen = NAME, REGISTERED[NAME]
    name, old = chosen
    settings = Settings(
        format,
        options.pop("max_num_tokens", old.max_num_tokens),
        options={**old.options, **options},
        linear=old.linear,
    )
    modules = list(experts_modules(model))
    if not modules:
        raise BackendError(f"{type(model).__name__} has no experts that run through Transformers' interface")
    lines = []
    for where, module in modules:
        module.__dict__[NAME_IN_MODEL] = where
        if (found := bound_to(module)) is not None and found.packed:
            restore(module)
        found = pack(module, settings)
        lines.append(f"{where}: {found.weights!r}, {bytes_text(found.weights.nbytes)}")
    _mark(model, name)
    return lines


def quantize_linear(
    model: torch.nn.Module,
    format: str = "nvfp4",
    *,
    exclude: Iterable[str] = EXCLUDED,
    input_format: str | None = None,
) -> list[str]:
    """Quantise and pack the Linear layers of a loaded model, one after the other; their own weights are let go.

    For dense models and for what stands around experts. exclude: patterns of module names (fnmatch) that stay; by
    default heads and routers. Returns a line for each layer; those that stay are named in the log with the reason.
    save_pretrained writes a quantised checkpoint. Raises FormatError for an unknown format, BackendError where no
    Linear was quantised.
    """
    settings = Settings(options={} if input_format is None else {"input_format": input_format})
    made = quantise(model, format, exclude, settings)
    if not made:
        raise BackendError(f"{type(model).__name__} has no Linear layer that can be quantised to {format}")
    mark_saved(model)
    return [str(line) for line in made]


def _mark(model: Any, name: str) -> None:
    """The model's implementation, and the quantiser that writes its checkpoint."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(name)
    for _, module in experts_modules(model):
        if module.config._experts_implementation not in REGISTERED:
            module.config._experts_implementation = name
    mark_saved(model)


def refresh(model: torch.nn.Module) -> int:
    """Drop the layers that were made from a model's own parameters, and return how many.

    The next call makes them from the weights as they are then. For weights written in a way that no call notices:
    see watch.py. Packed experts have no other weights than the packed ones, and stay.
    """
    count = 0
    for _, module in experts_modules(model):
        found = bound_to(module)
        if found is not None and not found.packed:
            del module.__dict__[LAYER]
            count += 1
    return count


def restore_experts(model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give all experts modules their own parameters back, dequantised (in `dtype`, by default the model's)."""
    for _, module in experts_modules(model):
        if not weight_names(module):
            restore(module, dtype)

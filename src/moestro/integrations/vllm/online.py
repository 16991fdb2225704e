"""`quantization="moestro_nvfp4"`: the experts of a bf16 checkpoint, quantised to NVFP4 while they are loaded.

Parameters begin on the meta device and are filled layer by layer (vLLM's online quantisation), so that one
layer's bf16 experts are in memory at a time. All else in the model stays as the checkpoint has it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from moestro.errors import BackendError
from moestro.integrations.vllm import log
from moestro.integrations.vllm.settings import FUSED_MOE, QUANTIZATION, Settings

NAME = "moestro_nvfp4"


def install(settings: Settings) -> None:
    """Make the name known to vLLM; a second call changes nothing."""
    try:
        quantization = importlib.import_module(QUANTIZATION)
        if NAME not in quantization.QUANTIZATION_METHODS:
            quantization.register_quantization_config(NAME)(_config(settings))
    except (ImportError, AttributeError) as error:
        log.info(f"quantization={NAME!r} is not there: this vLLM lacks what it needs ({error})")


def _config(settings: Settings) -> type:
    """vLLM's configuration class; what it needs besides is imported for the first layer."""
    base = importlib.import_module(f"{QUANTIZATION}.base_config").QuantizationConfig
    body = {
        "__module__": __name__,
        "__doc__": "vLLM's configuration of quantization='moestro_nvfp4'.",
        "get_name": lambda self: NAME,
        "get_supported_act_dtypes": lambda self: _dtypes(),
        "get_min_capability": classmethod(lambda cls: 80),
        "get_config_filenames": staticmethod(list),
        "from_config": classmethod(lambda cls, config: cls()),
        "get_quant_method": lambda self, layer, prefix: _method(layer, prefix, settings),
    }
    return type("MoestroNvfp4Config", (base,), body)


def _method(layer: Any, prefix: str, settings: Settings) -> Any:
    """The method of a layer: ours for experts, vLLM's unquantised one for linear layers, none for others."""
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    if isinstance(layer, linear.LinearBase):
        return linear.UnquantizedLinearMethod()
    if not isinstance(layer, importlib.import_module(FUSED_MOE).RoutedExperts):
        return None
    from moestro.integrations.vllm.kinds import AT_LOAD
    from moestro.integrations.vllm.refusals import why_not

    if reason := why_not(AT_LOAD, settings, (layer.moe_config,), {}):
        raise BackendError(f"quantization={NAME!r} cannot run {prefix}: {reason}")
    return _method_class(settings)(layer.moe_config)


@functools.cache
def _method_class(settings: Settings) -> type:
    from moestro.integrations.vllm.kinds import AT_LOAD
    from moestro.integrations.vllm.method import MoestroMethod

    original = importlib.import_module(f"{QUANTIZATION}.online.moe_base").OnlineMoEMethodBase
    body = {"__module__": __name__, "kind": AT_LOAD, "settings": settings, "quantize_to": "nvfp4"}
    return type("MoestroOnlineMoEMethod", (MoestroMethod, original), body)


def _dtypes() -> list[Any]:
    torch = importlib.import_module("torch")
    return [torch.bfloat16, torch.float16]

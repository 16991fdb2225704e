"""`quantization="moestro_nvfp4"`: the experts of a bf16 checkpoint, quantised to NVFP4 while they are loaded.

Parameters begin on the meta device and are filled layer by layer (vLLM's online quantisation), so that one
layer's bf16 experts are in memory at a time. All else in the model stays as the checkpoint has it.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from moestro.errors import BackendError
from moestro.integrations.vllm import kinds, log
from moestro.integrations.vllm.method import MoestroMethod
from moestro.integrations.vllm.refusals import why_not
from moestro.integrations.vllm.settings import Settings

NAME = "moestro_nvfp4"
KIND = dataclasses.replace(
    next(kind for kind in kinds.KINDS if kind.name == "bf16"), format="nvfp4", block=16, name="nvfp4"
)


def install(settings: Settings) -> None:
    """Make the name known to vLLM; a second call changes nothing."""
    try:
        quantization = importlib.import_module(kinds.QUANTIZATION)
        if NAME not in quantization.QUANTIZATION_METHODS:
            quantization.register_quantization_config(NAME)(_config(settings))
    except (ImportError, AttributeError) as error:
        log.info(f"quantization={NAME!r} is not there: this vLLM lacks what it needs ({error})")


def _config(settings: Settings) -> type:
    base = importlib.import_module(f"{kinds.QUANTIZATION}.base_config").QuantizationConfig
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    routed = importlib.import_module(kinds.FUSED_MOE).RoutedExperts
    online = importlib.import_module(f"{kinds.QUANTIZATION}.online.moe_base").OnlineMoEMethodBase
    fields = {"__module__": __name__, "kind": KIND, "settings": settings, "quantize_to": "nvfp4"}
    method = type("MoestroOnlineMoEMethod", (MoestroMethod, online), fields)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        if isinstance(layer, linear.LinearBase):
            return linear.UnquantizedLinearMethod()
        if not isinstance(layer, routed):
            return None
        if reason := why_not(KIND, settings, (layer.moe_config,), {}):
            raise BackendError(f"quantization={NAME!r} cannot run {prefix}: {reason}")
        return method(layer.moe_config)

    body = {
        "__module__": __name__,
        "__doc__": "vLLM's configuration of quantization='moestro_nvfp4'.",
        "get_name": lambda self: NAME,
        "get_supported_act_dtypes": lambda self: _dtypes(),
        "get_min_capability": classmethod(lambda cls: 80),
        "get_config_filenames": staticmethod(list),
        "from_config": classmethod(lambda cls, config: cls()),
        "get_quant_method": get_quant_method,
    }
    return type("MoestroNvfp4Config", (base,), body)


def _dtypes() -> list[Any]:
    torch = importlib.import_module("torch")
    return [torch.bfloat16, torch.float16]

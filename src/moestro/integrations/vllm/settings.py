"""What the environment says to the plugin.

MOESTRO_VLLM        1 (default), 0, or the kinds of experts to serve: "nvfp4,bf16" (NAMES has all)
MOESTRO_VLLM_W4A4   1 or 0: quantise activations of W4A4 checkpoints, or keep them in 16 bits; by default where
                    the device multiplies FP4
MOESTRO_VLLM_TUNE_S seconds of tuning before serving, in each process, for what no store or bundle knows; 0
MOESTRO_VLLM_STORE  folder of the decisions; by default the user's store
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moestro.errors import MoestroError, unknown_name

QUANTIZATION = "vllm.model_executor.layers.quantization"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
COMPRESSED = f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4"
CLASSES = {  # vLLM's method classes -> the kind of their experts
    f"{QUANTIZATION}.modelopt.ModelOptNvFp4FusedMoE": "nvfp4",
    f"{COMPRESSED}.CompressedTensorsW4A4Nvfp4MoEMethod": "nvfp4",
    f"{FUSED_MOE}.unquantized_fused_moe_method.UnquantizedFusedMoEMethod": "bf16",
    f"{QUANTIZATION}.mxfp4.GptOssMxfp4MoEMethod": "mxfp4",
    f"{QUANTIZATION}.fp8.Fp8MoEMethod": "fp8_block",
}
NAMES = tuple(dict.fromkeys(CLASSES.values()))


@dataclass(frozen=True)
class Settings:
    """See the module. quantize_input: None leaves it to the device."""

    kinds: frozenset[str] = frozenset(NAMES)
    quantize_input: bool | None = None
    tune_s: float = 0.0
    store: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Raises MoestroError for a value that means nothing, naming variable and value."""
        return cls(
            kinds=_kinds(environ.get("MOESTRO_VLLM", "1")),
            quantize_input=_switch("MOESTRO_VLLM_W4A4", environ),
            tune_s=_seconds("MOESTRO_VLLM_TUNE_S", environ),
            store=environ.get("MOESTRO_VLLM_STORE") or None,
        )


def _kinds(text: str) -> frozenset[str]:
    if text.strip() in ("", "1"):
        return frozenset(NAMES)
    if text.strip() == "0":
        return frozenset()
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in NAMES:
            raise MoestroError(unknown_name("MOESTRO_VLLM", name, ("0", "1", *NAMES)))
    return frozenset(chosen)


def _switch(name: str, environ: Mapping[str, str]) -> bool | None:
    text = environ.get(name, "").strip()
    if text not in ("", "0", "1"):
        raise MoestroError(f"{name} must be 0 or 1, got {text!r}")
    return None if not text else text == "1"


def _seconds(name: str, environ: Mapping[str, str]) -> float:
    text = environ.get(name, "").strip() or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise MoestroError(f"{name} must be a number of seconds of at least 0, got {text!r}")
    return seconds

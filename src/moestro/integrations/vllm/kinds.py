"""The checkpoints whose experts are served: vLLM's method class for each, and where its tensors are.

vLLM's create_weights and weight loaders are used as they are. After loading a layer has
    w13_*  [L, 2I, ...]  gate rows first, then up rows (alternating for gpt-oss: activation.INTERLEAVED)
    w2_*   [L, H, ...]
of this rank's L experts and its share I of the intermediate size. Nothing here imports vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moestro.errors import ShapeError
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block


@dataclass(frozen=True)
class Parts:
    """A layer's loaded experts: views of vLLM's parameters, in the checkpoint layout."""

    gate_up: FormatTensor  # [L, 2I, H]
    down: FormatTensor  # [L, H, I]
    gate_up_input_scale: torch.Tensor | None = None  # float32 [L], W4A4; NaN where it was not calibrated
    down_input_scale: torch.Tensor | None = None


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _moe(moe: Any, *args: Any, **kwargs: Any) -> Any:
    return moe


@dataclass(frozen=True)
class Kind:
    """One of vLLM's method classes.

    format: of its weights, which is also what MOESTRO_VLLM calls it. block: columns
    that share a scale. parts: the loaded tensors of (method, layer). moe_of: the FusedMoEConfig among the
    constructor's arguments. set_up: the attributes that its create_weights reads, from those arguments.
    required, calibrated: scales that every expert must have, and may have. quantizes_input: whether the
    checkpoint means activations to be quantised. vllm_runs: vLLM has kernels for it on every device.
    """

    format: str
    block: int
    parts: Callable[[Any, Any], Parts]
    moe_of: Callable[..., Any] = _moe
    set_up: Callable[..., None] = _nothing
    why_not: Callable[..., str | None] = _nothing
    required: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    quantizes_input: Callable[[Any], bool] = lambda method: False
    vllm_runs: bool = True

    def check_sizes(self, hidden: int, inter: int) -> None:
        """ShapeError unless H and this rank's I are whole blocks."""
        for name, size in (("hidden size", hidden), ("intermediate size per rank", inter)):
            if size % self.block:
                raise ShapeError(f"{name} must be divisible by {self.block} for {self.format}, got {size}")


# --- NVFP4 -----------------------------------------------------------------------------------------------
def _modelopt_set_up(method: Any, quant_config: Any, moe_config: Any) -> None:
    method.quant_config = quant_config
    method.use_a16 = quant_config.quant_method == "W4A16_NVFP4"
    method.use_global_sf = False


def _modelopt_why_not(quant_config: Any, moe_config: Any) -> str | None:
    if not quant_config.is_checkpoint_nvfp4_serialized:
        return "the checkpoint's weights are not NVFP4 yet"
    if quant_config.group_size != NVFP4.block:
        return f"NVFP4 has a scale per {NVFP4.block} columns, this checkpoint per {quant_config.group_size}"
    if getattr(quant_config, "moe_activation_override", None) is not None:
        return f"activations are to be quantised as {quant_config.moe_activation_override}"
    return None


def _modelopt_parts(method: Any, layer: Any) -> Parts:
    return Parts(
        NVFP4(layer.w13_weight.data, layer.w13_weight_scale.data, layer.w13_weight_scale_2.data),
        NVFP4(layer.w2_weight.data, layer.w2_weight_scale.data, layer.w2_weight_scale_2.data),
        layer.w13_input_scale.data.amax(dim=1),  # gate and up share their input: the larger loses no range
        layer.w2_input_scale.data,
    )


def _compressed_set_up(method: Any, moe: Any, layer_name: Any = None, use_a16: bool = False) -> None:
    method.group_size = NVFP4.block
    method.use_a16 = use_a16
    method.use_global_sf = False


def _compressed_parts(method: Any, layer: Any) -> Parts:
    return Parts(  # global scales divide in this layout
        NVFP4(
            layer.w13_weight_packed.data, layer.w13_weight_scale.data, 1 / layer.w13_weight_global_scale.data
        ),
        NVFP4(layer.w2_weight_packed.data, layer.w2_weight_scale.data, 1 / layer.w2_weight_global_scale.data),
        (1 / layer.w13_input_global_scale.data).amax(dim=1),
        1 / layer.w2_input_global_scale.data,
    )


# --- bf16, MXFP4, FP8 ------------------------------------------------------------------------------------
def _dense_parts(method: Any, layer: Any) -> Parts:
    return Parts(BF16(layer.w13_weight.data), BF16(layer.w2_weight.data))


def _mxfp4_set_up(method: Any, moe: Any) -> None:
    method.weight_dtype = "gpt_oss_mxfp4"  # GptOssRoutedExperts' loader asks for it


def _mxfp4_parts(method: Any, layer: Any) -> Parts:
    return Parts(
        MXFP4(layer.w13_weight.data, layer.w13_weight_scale.data),
        MXFP4(layer.w2_weight.data, layer.w2_weight_scale.data),
    )


def _fp8_set_up(method: Any, quant_config: Any, layer: Any) -> None:
    method.quant_config = quant_config
    method.weight_block_size = method.moe_block_shape = quant_config.weight_block_size
    method.block_quant, method.weight_scale_name = True, "weight_scale_inv"
    method.weight_scale_refine = None


def _fp8_why_not(quant_config: Any, layer: Any) -> str | None:
    if not quant_config.is_checkpoint_fp8_serialized or quant_config.weight_block_size != [128, 128]:
        return f"FP8 is served in blocks of [128, 128], got {quant_config.weight_block_size}"
    if quant_config.activation_scheme != "dynamic":
        return f"FP8 activations are served 'dynamic', got {quant_config.activation_scheme!r}"
    return None


def _fp8_parts(method: Any, layer: Any) -> Parts:
    return Parts(
        FP8Block(layer.w13_weight.data, layer.w13_weight_scale_inv.data),
        FP8Block(layer.w2_weight.data, layer.w2_weight_scale_inv.data),
    )


KINDS = {  # by vLLM's method class; settings.CLASSES says where that is
    "ModelOptNvFp4FusedMoE": Kind(
        "nvfp4",
        NVFP4.block,
        _modelopt_parts,
        moe_of=lambda quant_config, moe_config: moe_config,
        set_up=_modelopt_set_up,
        why_not=_modelopt_why_not,
        required=("w13_weight_scale", "w2_weight_scale", "w13_weight_scale_2", "w2_weight_scale_2"),
        calibrated=("w13_input_scale", "w2_input_scale"),
        quantizes_input=lambda method: not method.use_a16,
        vllm_runs=False,
    ),
    "CompressedTensorsW4A4Nvfp4MoEMethod": Kind(
        "nvfp4",
        NVFP4.block,
        _compressed_parts,
        set_up=_compressed_set_up,
        required=(
            "w13_weight_scale",
            "w2_weight_scale",
            "w13_weight_global_scale",
            "w2_weight_global_scale",
        ),
        calibrated=("w13_input_global_scale", "w2_input_global_scale"),
        quantizes_input=lambda method: not method.use_a16,
        vllm_runs=False,
    ),
    "UnquantizedFusedMoEMethod": Kind(
        "bf16",
        1,
        _dense_parts,
    ),
    "GptOssMxfp4MoEMethod": Kind(
        "mxfp4",
        MXFP4.block,
        _mxfp4_parts,
        set_up=_mxfp4_set_up,
        required=("w13_weight_scale", "w2_weight_scale"),
    ),
    "Fp8MoEMethod": Kind(
        "fp8_block",
        128,
        _fp8_parts,
        moe_of=lambda quant_config, layer: layer.moe_config,
        set_up=_fp8_set_up,
        why_not=_fp8_why_not,
        required=("w13_weight_scale_inv", "w2_weight_scale_inv"),
    ),
}

# bf16 experts that are quantised when they have been loaded
AT_LOAD = dataclasses.replace(
    KINDS["UnquantizedFusedMoEMethod"], format="nvfp4", block=NVFP4.block, vllm_runs=False
)

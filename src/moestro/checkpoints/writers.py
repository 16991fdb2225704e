"""Experts as a checkpoint holds them: a row for each (layout, format), and the config that goes with it.

The layouts are those of layouts.py, read the other way; what is written here is read by vLLM, SGLang, TensorRT-LLM
and Transformers under the quantisation config of `config_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moestro.checkpoints.int4 import to_compressed_tensors
from moestro.errors import FormatError
from moestro.formats import BF16, INT4, MXFP4, MXFP8, NVFP4, FormatTensor, FP8Block

Pieces = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Writer:
    """layout: its name on the command line. pieces: a projection's tensors by suffix."""

    layout: str
    format: str
    pieces: Callable[[Any], Pieces]
    input_scale: Callable[[torch.Tensor], Pieces] = lambda scale: {}


WRITERS = {
    (w.layout, w.format): w
    for w in (
        Writer(
            "modelopt",
            "nvfp4",
            lambda q: {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.global_scale},
            lambda scale: {"input_scale": scale},
        ),
        Writer("modelopt", "mxfp4", lambda q: {"weight": q.packed, "weight_scale": q.scale}),
        Writer("modelopt", "mxfp8", lambda q: {"weight": q.data, "weight_scale": q.scale}),
        Writer("modelopt", "fp8_block", lambda q: {"weight": q.data, "weight_scale": q.scale_inv}),
        Writer(
            "compressed-tensors",
            "nvfp4",
            lambda q: {
                "weight_packed": q.packed,
                "weight_scale": q.scale,
                "weight_global_scale": (1 / q.global_scale).reshape(1),
            },
            lambda scale: {"input_global_scale": (1 / scale).reshape(1)},
        ),
        Writer("compressed-tensors", "mxfp4", lambda q: {"weight_packed": q.packed, "weight_scale": q.scale}),
        Writer("compressed-tensors", "mxfp8", lambda q: {"weight": q.data, "weight_scale": q.scale}),
        Writer("compressed-tensors", "fp8_block", lambda q: {"weight": q.data, "weight_scale": q.scale_inv}),
        Writer("compressed-tensors", "int4", to_compressed_tensors),
        Writer("deepseek", "fp8_block", lambda q: {"weight": q.data, "weight_scale_inv": q.scale_inv}),
        Writer("dense", "bf16", lambda q: {"weight": q.data}),
    )
}
# The layout of a format where none is asked for.
DEFAULT_LAYOUT = {
    "nvfp4": "modelopt",
    "mxfp4": "modelopt",
    "mxfp8": "modelopt",
    "fp8_block": "deepseek",
    "int4": "compressed-tensors",
    "bf16": "dense",
}


def writer_for(layout: str | None, format: str) -> Writer:
    """The row. Raises FormatError for a combination that there is not, and names those that there are."""
    layout = layout or DEFAULT_LAYOUT.get(format, "modelopt")
    if (layout, format) not in WRITERS:
        known = ", ".join(f"{f} as {name}" for name, f in WRITERS)
        raise FormatError(f"format {format!r} cannot be written as layout {layout!r}; there are {known}")
    return WRITERS[layout, format]


def expert_tensors(
    writer: Writer,
    prefix: str,
    experts: Iterable[tuple[FormatTensor, FormatTensor]],
    side: dict[str, Any],
    *,
    gated: bool,
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every expert, from (gate_up, down) in the checkpoint layout and what travels with them."""
    if side.get("gate_up_pre_scale") is not None or side.get("up_has_down_pre_scale"):
        raise FormatError(f"{prefix} has weights with scales of input channels (AWQ), which are not written")
    *ups, last = names if gated else names[1:]
    for e, (gate_up, down) in enumerate(experts):
        parts = [*zip(ups, split_rows(gate_up, len(ups)), strict=True), (last, down)]
        for name, tensor in parts:
            first = name != last
            for suffix, piece in writer.pieces(tensor).items():
                yield f"{prefix}.{e}.{name}.{suffix}", piece.contiguous()
            scale = side.get("gate_up_input_scale" if first else "down_input_scale")
            if scale is not None:
                one = (scale[e] if scale.ndim else scale).clone()  # a tensor of its own for each projection
                yield from ((f"{prefix}.{e}.{name}.{s}", v) for s, v in writer.input_scale(one).items())
            if (bias := side.get("gate_up_bias" if first else "down_bias")) is not None:
                row = bias[e].chunk(len(ups))[ups.index(name)] if first else bias[e]
                yield f"{prefix}.{e}.{name}.bias", row.contiguous()


def split_rows(tensor: FormatTensor, parts: int) -> list[FormatTensor]:
    """A tensor [R, C] in equal parts of its rows."""
    if parts == 1:
        return [tensor]
    if isinstance(tensor, NVFP4):
        return _split_nvfp4(tensor, parts)
    if isinstance(tensor, FP8Block) and (tensor.shape[0] // parts) % 128:
        raise FormatError(
            "gate and up share FP8 blocks where I is no multiple of 128, and a checkpoint keeps them apart: "
            f"I={tensor.shape[0] // parts} cannot be written"
        )
    assert isinstance(tensor, BF16 | MXFP4 | MXFP8 | FP8Block | INT4)
    pieces = zip(*(piece.chunk(parts, dim=-2) for piece in tensor.pieces), strict=True)
    return [type(tensor)(*some) for some in pieces]


def _split_nvfp4(tensor: NVFP4, parts: int) -> list[FormatTensor]:
    groups = tensor.row_groups
    if groups not in (1, parts):
        raise FormatError(
            f"NVFP4 rows must have one global scale a projection to be written, got {groups} for {parts}"
        )
    scale = tensor.global_scale.reshape(-1).expand(parts) if groups == 1 else tensor.global_scale
    packed, scales = tensor.packed.chunk(parts, dim=-2), tensor.scale.chunk(parts, dim=-2)
    return [NVFP4(packed[i], scales[i], scale[i].clone()) for i in range(parts)]


# --- configs ---------------------------------------------------------------------------------------------
def config_for(
    writer: Writer,
    excluded: list[str],
    *,
    activations: bool = False,
    group: int = 32,
    symmetric: bool = True,
) -> dict[str, Any] | None:
    """config.json's quantization_config. excluded: modules with plain weights. activations: input scales are there.

    group, symmetric: of int4 weights.
    """
    if writer.format == "bf16":
        return None
    if writer.layout == "deepseek":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": excluded,
        }
    if writer.layout == "modelopt":
        algorithms = {"mxfp4": "MXFP4", "mxfp8": "MXFP8", "fp8_block": "FP8_PB_WO"}
        nvfp4 = "NVFP4" if activations else "W4A16_NVFP4"
        return {
            "quant_method": "modelopt",
            "quant_algo": algorithms.get(writer.format, nvfp4),
            "kv_cache_quant_algo": None,
            "group_size": {"nvfp4": 16, "fp8_block": 128}.get(writer.format, 32),
            "exclude_modules": excluded,
        }
    config = _compressed_tensors_config(writer.format, excluded, activations)
    if writer.format == "int4":
        weights = config["config_groups"]["group_0"]["weights"]
        weights.update(type="int", group_size=group, symmetric=symmetric)
    return config


def _compressed_tensors_config(format: str, excluded: list[str], activations: bool) -> dict[str, Any]:
    names = {
        "nvfp4": "nvfp4-pack-quantized",
        "mxfp4": "mxfp4-pack-quantized",
        "mxfp8": "mxfp8-quantized",
        "fp8_block": "float-quantized",
        "int4": "pack-quantized",
    }
    bits = 4 if format.endswith("4") else 8
    shape: dict[str, Any] = {"strategy": "tensor_group" if format == "nvfp4" else "group"}
    shape["group_size"] = 16 if format == "nvfp4" else 32
    if format == "fp8_block":
        shape = {"strategy": "block", "block_structure": [128, 128]}
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, **shape}
    inputs = {**weights, "dynamic": "local"} if activations else None
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": names[format],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": names[format]}},
        "ignore": excluded,
    }

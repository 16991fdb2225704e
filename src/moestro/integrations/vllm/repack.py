"""Loaded parameters to expert weights: checked for holes, put in order, repacked once, vLLM's copy given back.

Scales are filled with NaN before loading: a scale that the checkpoint does not have is still NaN afterwards
(vLLM counts a parameter as loaded when one expert's share is). Repacking goes expert by expert and releases each
expert's pages as it goes, so that a layer is never there twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moestro.errors import FormatError
from moestro.formats import BF16, NVFP4, FormatTensor
from moestro.integrations.vllm import log
from moestro.integrations.vllm.activation import INTERLEAVED
from moestro.integrations.vllm.kinds import Kind, Parts
from moestro.moe.weights import ExpertWeights

SHOWN = 8  # experts named in an error


def blank(kind: Kind, layer: Any) -> None:
    """Fill a new layer's scales with NaN, where they are in memory."""
    for name in (*kind.required, *kind.calibrated):
        scale = getattr(layer, name).data
        if scale.device.type == "meta":
            continue
        if scale.dtype == torch.float8_e4m3fn:
            scale.view(torch.uint8).fill_(0x7F)
        else:
            scale.fill_(0xFF if scale.dtype == torch.uint8 else torch.nan)  # 255 is e8m0's NaN


def check_loaded(kind: Kind, layer: Any) -> None:
    """FormatError for scales that the checkpoint did not have, naming layer, tensor and experts."""
    for name in kind.required:
        scale = getattr(layer, name).data
        missing = [e for e, part in enumerate(scale) if bool(_is_nan(part).any())]
        if missing:
            names = _global_ids(layer, missing)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise FormatError(
                f"{layer.layer_name}: every expert must have a {name.partition('_')[2]} for {name}, got none "
                f"(or NaN) in the checkpoint for experts {', '.join(map(str, names[:SHOWN]))}{more}"
            )


def expert_weights(kind: Kind, method: Any, layer: Any, input_format: str | None) -> ExpertWeights:
    """The layer's experts in the checkpoint layout, as views of vLLM's parameters. Alternating rows are ordered
    in place.
    """
    check_loaded(kind, layer)
    parts = kind.parts(method, layer)
    gate_up_bias, down_bias = _bias(layer, "w13_bias"), _bias(layer, "w2_bias")
    if layer.activation.value == INTERLEAVED:
        for rows in (*_pieces(parts.gate_up), *([] if gate_up_bias is None else [gate_up_bias])):
            halves_first(rows)
    for tensor in (parts.gate_up, parts.down):
        if isinstance(tensor, NVFP4):
            signs_to_codes(tensor)
    scales = _input_scales(parts, layer) if input_format == "nvfp4" else (None, None)
    return ExpertWeights(
        parts.gate_up,
        parts.down,
        gate_up_bias=None if gate_up_bias is None else gate_up_bias.clone(),
        down_bias=None if down_bias is None else down_bias.clone(),
        gate_up_input_scale=scales[0],
        down_input_scale=scales[1],
    )


def quantized(dense: ExpertWeights, format: str) -> ExpertWeights:
    """bf16 experts quantised to `format`, one after the other, straight into the kernel layout."""
    assert isinstance(dense.gate_up, BF16)
    assert isinstance(dense.down, BF16)
    return ExpertWeights.from_dense(
        dense.gate_up.data,
        dense.down.data,
        format,
        gate_up_bias=dense.gate_up_bias,
        down_bias=dense.down_bias,
        backend="auto",
    )


def release(layer: Any) -> int:
    """Empty vLLM's expert parameters, which stay as names for its loaders; the bytes that they had."""
    freed = 0
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith(("w13_", "w2_")):
            freed += parameter.data.nbytes
            parameter.data = parameter.data.new_empty(0)
    return freed


def halves_first(rows: torch.Tensor) -> None:
    """[L, 2I, ...] whose rows alternate gate, up, in place to gate rows first; an expert's copy at a time."""
    for one in rows:
        ordered = torch.cat([one[0::2], one[1::2]])
        one.copy_(ordered)


def signs_to_codes(tensor: NVFP4) -> None:
    """Move the signs of block scales to the blocks' codes, in place: the same values, as kernels take them.

    No checkpoint has negative scales, but vLLM's load_format="dummy" does.
    """
    for packed, scale in zip(tensor.packed, tensor.scale.view(torch.uint8), strict=True):
        negative = scale >= 0x80
        if bool(negative.any()):
            packed ^= negative.to(torch.uint8).mul_(0x88).repeat_interleave(NVFP4.block // 2, dim=-1)
            scale &= 0x7F


def _pieces(tensor: FormatTensor) -> Iterator[torch.Tensor]:
    """A format tensor's pieces that have a row each for its rows."""
    experts, rows, _ = tensor.shape
    for piece in vars(tensor).values():
        if isinstance(piece, torch.Tensor) and piece.ndim == 3 and piece.shape[:2] == (experts, rows):
            yield piece if piece.dtype != torch.float8_e4m3fn else piece.view(torch.uint8)


def _bias(layer: Any, name: str) -> torch.Tensor | None:
    bias = getattr(layer, name, None)
    return None if bias is None else bias.data


def _input_scales(parts: Parts, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The calibrated scales where every expert has them; else they are dynamic, per token."""
    found = (parts.gate_up_input_scale, parts.down_input_scale)
    if any(scale is None or bool(torch.isnan(scale).any()) for scale in found):
        log.info(f"{layer.layer_name}: input scales are not calibrated for all experts: dynamic, per token")
        return None, None
    return found


def _is_nan(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float8_e4m3fn:
        return (values.view(torch.uint8) & 0x7F) == 0x7F
    return values == 0xFF if values.dtype == torch.uint8 else torch.isnan(values)


def _global_ids(layer: Any, local: list[int]) -> list[int]:
    """The model's numbers of this rank's experts."""
    if layer.expert_map is None:
        return local
    places = layer.expert_map.tolist()
    return [places.index(e) for e in local]

"""The operator in plain PyTorch, one expert after the other, in float32 or float64: the truth for every test.

It shares no code with the backends: experts are dequantised whole, sums are in the chosen dtype, and nothing
is rounded in between but what input_format="nvfp4" rounds on purpose (x per token, and the intermediate per
pair, quantised from its unrounded value).
"""

from __future__ import annotations

import torch

from moestro.errors import DTypeError, FormatError, ShapeError, unknown_name
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.problem import Experts

INPUT_FORMATS = ("nvfp4",)


def fused_moe(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: Experts,
    *,
    activation: str | Activation = "silu",
    input_format: str | None = None,
    expert_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y[n] = Σ_k weights[n, k] · (down[e] @ act(gate_up[e] @ x[n] + bias) + bias), e = ids[n, k] - offset.

    x [N, H] floating, or formats.NVFP4 of [N, H] (which implies input_format="nvfp4"); ids int [N, K], of
    which those outside expert_offset .. expert_offset + L contribute nothing; weights [N, K]; w: an
    ExpertWeights.
    Returns [N, H] in `dtype` (float32 or float64), computed in it.
    Raises ShapeError, DTypeError, FormatError or BackendError for what does not fit.
    """
    if dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if input_format is not None and input_format not in INPUT_FORMATS:
        raise FormatError(unknown_name("input_format", input_format, INPUT_FORMATS))
    if ids.ndim != 2 or ids.shape != weights.shape or len(x.shape) != 2 or x.shape[0] != ids.shape[0]:
        raise ShapeError(
            f"x must be [N, H], ids and weights [N, K], got {list(x.shape)}, {list(ids.shape)}, "
            f"{list(weights.shape)}"
        )
    act = resolve_activation(activation)
    quantized = input_format is not None or isinstance(x, NVFP4)
    dense = x.dequantize(torch.float32) if isinstance(x, NVFP4) else x
    requantize = quantized and not isinstance(x, NVFP4)
    if (pre_scale := getattr(w, "gate_up_pre_scale", None)) is not None:
        dense = dense.to(dtype) * pre_scale.to(dtype)
    out = torch.zeros(dense.shape, dtype=dtype, device=dense.device)  # [N, H]
    for e in range(w.gate_up.shape[0]):
        token, slot = torch.where(ids == e + expert_offset)
        if not len(token):
            continue
        rows = dense[token]  # [M, H]
        if requantize:
            rows = _through_nvfp4(rows, _scale_of(w.gate_up_input_scale, e))
        h = rows.to(dtype) @ w.gate_up.expert(e).dequantize(torch.float32).to(dtype).T  # [M, 2I]
        if w.gate_up_bias is not None:
            h = h + w.gate_up_bias[e].to(dtype)
        a = act(h)  # [M, I]
        if quantized:
            a = _through_nvfp4(a, _scale_of(w.down_input_scale, e)).to(dtype)
        y = a @ w.down.expert(e).dequantize(torch.float32).to(dtype).T  # [M, H]
        if w.down_bias is not None:
            y = y + w.down_bias[e].to(dtype)
        out.index_add_(0, token, y * weights[token, slot, None].to(dtype))
    return out


def _scale_of(scale: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return scale[expert] if scale is not None and scale.ndim else scale


def _through_nvfp4(rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Rows [M, C] quantised to NVFP4 and back, under a dynamic global scale per row or the given one."""
    return NVFP4.quantize_rows(rows, scale).dequantize(torch.float32)

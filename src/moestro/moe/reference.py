"""The operator in plain PyTorch, one expert after the other, in float32 or float64: the truth for every test.

It shares no code with the backends: experts are dequantised whole, sums are in the chosen dtype, and nothing
is rounded in between but what input_format rounds on purpose (x per token, and the intermediate per pair,
quantised from its unrounded value), and what weight_rounding rounds. docs/numerics.md has the definitions.
"""

from __future__ import annotations

import torch

from moestro.errors import DTypeError, FormatError, ShapeError, unknown_name
from moestro.formats import MXFP4, NVFP4
from moestro.formats.base import FormatTensor
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.problem import INPUT_FORMATS, Experts

WEIGHT_ROUNDINGS = ("e4m3",)
E4M3_MAX, INT8_MAX = 448.0, 127.0
INT8_BLOCK, FP8_BLOCK = 32, 128
TINY = torch.finfo(torch.float32).tiny


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
    weight_rounding: str | None = None,
) -> torch.Tensor:
    """y[n] = Σ_k weights[n, k] · (down[e] @ act(gate_up[e] @ x[n] + bias) + bias), e = ids[n, k] - offset.

    x [N, H] floating, or formats.NVFP4 of [N, H] (which implies input_format="nvfp4"); ids int [N, K], of
    which those outside expert_offset .. expert_offset + L contribute nothing; weights [N, K]; w: an
    ExpertWeights. input_format: None, "nvfp4", "fp8" or "int8", of x and of the intermediate.
    weight_rounding="e4m3": weights as FP8 tensor cores take 4-bit ones that were folded, see `fold_e4m3`.
    Returns [N, H] in `dtype` (float32 or float64), computed in it.
    Raises ShapeError, DTypeError, FormatError or BackendError for what does not fit.
    """
    _check(x, ids, weights, input_format, dtype, weight_rounding)
    act = resolve_activation(activation)
    quantized = "nvfp4" if isinstance(x, NVFP4) else input_format
    dense = x.dequantize(torch.float32) if isinstance(x, NVFP4) else x
    columns = FP8_BLOCK if w.gate_up.format == "fp8_block" else None
    if (pre_scale := getattr(w, "gate_up_pre_scale", None)) is not None:
        dense = dense.to(dtype) * pre_scale.to(dtype)
    out = torch.zeros(dense.shape, dtype=dtype, device=dense.device)  # [N, H]
    for e in range(w.gate_up.shape[0]):
        token, slot = torch.where(ids == e + expert_offset)
        if not len(token):
            continue
        rows = dense[token].to(dtype)  # [M, H]
        if quantized is not None and not isinstance(x, NVFP4):
            rows = through(rows, quantized, _scale_of(w.gate_up_input_scale, e), columns)
        h = rows @ _matrix(w.gate_up.expert(e), dtype, weight_rounding).T  # [M, 2I]
        if w.gate_up_bias is not None:
            h = h + w.gate_up_bias[e].to(dtype)
        a = act(h)  # [M, I]
        if quantized is not None:
            a = through(a, quantized, _scale_of(w.down_input_scale, e), columns)
        y = a @ _matrix(w.down.expert(e), dtype, weight_rounding).T  # [M, H]
        if w.down_bias is not None:
            y = y + w.down_bias[e].to(dtype)
        out.index_add_(0, token, y * weights[token, slot, None].to(dtype))
    return out


def _check(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    input_format: str | None,
    dtype: torch.dtype,
    weight_rounding: str | None,
) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    for name, value, known in (
        ("input_format", input_format, tuple(INPUT_FORMATS)),
        ("weight_rounding", weight_rounding, WEIGHT_ROUNDINGS),
    ):
        if value is not None and value not in known:
            raise FormatError(unknown_name(name, value, known))
    if ids.ndim != 2 or ids.shape != weights.shape or len(x.shape) != 2 or x.shape[0] != ids.shape[0]:
        raise ShapeError(
            f"x must be [N, H], ids and weights [N, K], got {list(x.shape)}, {list(ids.shape)}, "
            f"{list(weights.shape)}"
        )
    if isinstance(x, NVFP4) and input_format not in (None, "nvfp4"):
        raise FormatError(f"input_format must be None or 'nvfp4' for an NVFP4 x, got {input_format!r}")


def through(
    rows: torch.Tensor, input_format: str, scale: torch.Tensor | None = None, fp8_columns: int | None = None
) -> torch.Tensor:
    """Rows [M, C] quantised to an input format and back, in their dtype; quantised from float32.

    scale: a calibrated global scale, of "nvfp4" only. fp8_columns: columns that share a scale in "fp8"; None: a
    whole row does.
    """
    if input_format == "nvfp4":
        return NVFP4.quantize_rows(rows.float(), scale).dequantize(torch.float32).to(rows.dtype)
    width = INT8_BLOCK if input_format == "int8" else fp8_columns or max(1, rows.shape[1])
    return torch.cat([_symmetric(part, input_format) for part in torch.split(rows, width, dim=1)], dim=1)


def _symmetric(part: torch.Tensor, input_format: str) -> torch.Tensor:
    """[M, C] of one scale a row, through int8 or e4m3 and back: both round to nearest, ties to even."""
    most = INT8_MAX if input_format == "int8" else E4M3_MAX
    part32 = part.float()
    amax = part32.abs().amax(dim=1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax / torch.full_like(amax, most)).clamp(min=TINY))
    codes = (part32 / scale).clamp(-most, most)
    codes = codes.round() if input_format == "int8" else codes.to(torch.float8_e4m3fn)
    return codes.to(part.dtype) * scale.to(part.dtype)


def _matrix(tensor: FormatTensor, dtype: torch.dtype, rounding: str | None) -> torch.Tensor:
    """Dense [R, C] of one expert."""
    dense = tensor.dequantize(torch.float32)
    return dense.to(dtype) if rounding is None else fold_e4m3(tensor).to(dtype)


def fold_e4m3(tensor: FormatTensor) -> torch.Tensor:
    """One expert's matrix [R, C] with each 4-bit weight rounded to e4m3 under one power of two a row, in float32.

    A row's block scales over the power of two that brings the largest of them into (36, 72] are s; e2m1 · s, at most
    432, is rounded to e4m3 (to nearest, ties to even). A scale under 2^-5 there, which is 1152 times less than the
    row's largest at least, counts as 2^-5, and its codes as the nearest for that. Other formats are as they are.
    """
    checkpoint = tensor.to_checkpoint()
    if isinstance(checkpoint, NVFP4):
        scale, rest, width = checkpoint.scale.float().abs(), checkpoint.row_global_scale(), 16
        plain = checkpoint.dequantize_unscaled(torch.float32)
    elif isinstance(checkpoint, MXFP4):
        scale, width = torch.exp2(checkpoint.scale.double() - 127.0), 32
        rest, plain = (
            torch.ones((), dtype=torch.float32, device=scale.device),
            checkpoint.dequantize(torch.float32),
        )
    else:
        return checkpoint.dequantize(torch.float32)
    if not plain.numel():
        return plain
    largest = scale.double().amax(-1, keepdim=True)
    power = torch.exp2(torch.floor(torch.log2(72.0 / torch.where(largest > 0, largest, 72.0))))
    small = (scale.double() * power < 2.0**-5).repeat_interleave(width, -1)
    value = plain.double() * power
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=value.device) * 2.0**-5
    nearest = grid[(value.abs().unsqueeze(-1) - grid).abs().argmin(-1)].copysign(value)
    value = torch.where(small, nearest, value).float().to(torch.float8_e4m3fn).double()
    return (value / power * rest.double()).float()


def _scale_of(scale: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return scale[expert] if scale is not None and scale.ndim else scale

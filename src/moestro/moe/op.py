"""moestro.fused_moe: the operator as a function. What runs is a bound call (call.py)."""

from __future__ import annotations

from typing import Any

import torch

from moestro.errors import DTypeError, FormatError
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation
from moestro.moe.call import gradients_wanted, run
from moestro.moe.torch_op import call_operator, options_text, recorded
from moestro.moe.weights import ExpertWeights


def fused_moe(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    *,
    activation: str | Activation = "silu",
    input_format: str | None = None,
    expert_offset: int = 0,
    deterministic: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    tactic: Any = None,
    num_experts: int | None = None,
) -> torch.Tensor:
    """y[n] = Σ_k weights[n, k] · expert(ids[n, k])(x[n]), summed in float32, rounded once to x's dtype.

    x: [N, H] bf16, fp16 or fp32, or formats.NVFP4 of [N, H] (quantised activations: input_format="nvfp4" is
    implied, and the result is bf16). ids: int32 or int64 [N, K], global expert ids. weights: float32 [N, K].
    w: the experts expert_offset .. expert_offset + L. Pairs of other experts contribute nothing.

    activation: "silu", "gelu_tanh", "relu2" (no gate) or an Activation such as SwiGLU(alpha=, limit=).
    input_format: x and the intermediate are quantised too: "nvfp4" (W4A4), "fp8" (e4m3 per token) or "int8" (per 32
    columns); docs/numerics.md has the definitions.
    deterministic: the same bits each time. batch_invariant: a token's result has the same bits whatever N, its place,
    the other tokens and their routing. out: where to write, [N, H] in x's dtype, not overlapping x.
    backend: "auto", "triton", "cpu" or "portable". tactic: one of the backend's; None lets the tuner choose.
    num_experts: E; by default those of w, and unknown with an expert_offset.

    A backend that wants weights in its kernel layout repacks those of the checkpoint layout at the first
    call, and the copy stays with `w`; w.prepare() beforehand, as FusedMoE does, keeps one.

    Gradients: of x and of weights, through frozen experts; where the tensors that `w` was made from want one
    themselves, backward raises BackendError.

    Raises ShapeError, DTypeError, DeviceError, FormatError, RoutingError or BackendError, naming the
    argument, before any work. Safe to call from several threads and on several streams.
    """
    if not isinstance(w, ExpertWeights):
        raise DTypeError(f"w must be a moestro.ExpertWeights, got {type(w).__name__}")
    if isinstance(x, NVFP4):
        if input_format not in (None, "nvfp4"):
            raise FormatError(f"input_format must be None or 'nvfp4' for an NVFP4 x, got {input_format!r}")
        input_format = "nvfp4"
    if w.gate_up_pre_scale is not None:
        x = w.scaled_input(x)
    options = (
        activation, input_format, expert_offset, deterministic, batch_invariant, backend, tactic, num_experts,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return call_operator(x, ids, weights, w, options_text(options), out)
    if not torch.is_grad_enabled() or not gradients_wanted(x, weights, w):
        return run(x, ids, weights, w, options, out)
    return recorded(x, ids, weights, w, out, options_text(options))

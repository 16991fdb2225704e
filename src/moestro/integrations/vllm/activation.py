"""vLLM's MoE activations as ours. Where it has none, the layer stays vLLM's."""

from __future__ import annotations

from typing import Any

from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU

INTERLEAVED = "swigluoai"  # gate and up rows of w13 alternate, as in gpt-oss' checkpoints


def activation_of(moe: Any) -> Activation | str:
    """The activation of a FusedMoEConfig, or why we have none.

    vLLM's clamped SwiGLU (silu_and_mul_with_clamp) is gate · sigmoid(alpha · gate) · (up + beta), gate clamped
    from above and up on both sides: SwiGLU(alpha, limit, up_shift=beta).
    """
    name: str = moe.activation.value
    alpha, beta, limit = moe.swiglu_alpha, moe.swiglu_beta, moe.swiglu_limit
    if name == "silu":
        if alpha not in (None, 1.0) or beta not in (None, 0.0):
            return f"activation silu with swiglu_alpha={alpha} and swiglu_beta={beta} has two meanings"
        return SwiGLU(limit=limit)
    if name == INTERLEAVED:  # vLLM's kernel has gpt-oss' constants
        return SwiGLU(_or(alpha, 1.702), _or(limit, 7.0), _or(beta, 1.0))
    if name == "swigluoai_uninterleave":
        return SwiGLU(_or(alpha, 1.0), limit, _or(beta, 0.0))
    plain: dict[str, Activation] = {"gelu_tanh": GeGLUTanh(), "relu2_no_mul": ReLU2()}
    if name in plain:
        if limit is not None:
            return f"activation {name} with swiglu_limit={limit} has no kernel"
        return plain[name]
    return f"activation {name} has no kernel"


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)

"""What a gradient is computed by, and who is refused one.

Packed experts are frozen: the backward pass gives the gradients of x and of the routing weights, from each hit
expert's matrices, dequantised one at a time, in float32. Quantised activations count as what they stand for (a
straight-through estimate). The experts' own parameters get none: where one of the tensors that weights were made from
wants a gradient, the backward pass raises. There is no second derivative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.kernels.portable.quantize import through
from moestro.kernels.portable.stages import pick_scale
from moestro.moe.options import Options, make_problem
from moestro.moe.weights import ExpertWeights


def refuse(y: torch.Tensor, w: ExpertWeights) -> torch.Tensor:
    """y, whose backward raises where one of the tensors that w was made from wants a gradient."""
    wanting = w.wanting_gradients()
    return y if not wanting else _Refuse.apply(y, ", ".join(wanting), *wanting.values())  # type: ignore[no-untyped-call]


class _Refuse(torch.autograd.Function):
    """Passes its first tensor on; there is no way back."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, names: str, *origins: torch.Tensor) -> torch.Tensor:
        ctx.names = names
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackendError(
            f"{ctx.names} of the experts want a gradient, and moestro gives none to experts' parameters: freeze "
            "them (requires_grad_(False)) to train what is around them, or train with PyTorch's own experts"
        )


def backward(
    grad: torch.Tensor,
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x [N, H] (in y's dtype; of no use for an NVFP4 x) and of weights [N, K], from y's [N, H].

    Not to be called where autograd is off below an operator: the activation's derivative is autograd's.
    """
    given = isinstance(x, NVFP4)
    if given:
        options = replace(options, input_format="nvfp4")
    problem = make_problem(w, options, top_k=ids.shape[1], dtype=grad.dtype)
    dense = x.dequantize(torch.float32) if isinstance(x, NVFP4) else x.float()
    dy, dx, dweights = grad.float(), torch.zeros_like(dense), torch.zeros_like(weights)
    local = ids.long() - options.expert_offset
    here = (local >= 0) & (local < w.num_experts)
    for e in torch.unique(local[here]).tolist():
        token, slot = torch.where(local == e)
        gate_up, down = (m.expert(e).dequantize(torch.float32) for m in (w.gate_up, w.down))
        rows = dense[token]  # [M, H]
        if problem.input_format is not None and not given:
            rows = through(problem, rows, pick_scale(w.gate_up_input_scale, e))
        h = _with_bias(rows @ gate_up.T, w.gate_up_bias, e)
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            activated = problem.activation(leaf)
        a = activated.detach()
        if problem.input_format is not None:
            a = through(problem, a, pick_scale(w.down_input_scale, e))
        y = _with_bias(a @ down.T, w.down_bias, e)  # [M, H]
        dweights[token, slot] = (dy[token] * y).sum(-1)
        da = (dy[token] * weights[token, slot, None]) @ down
        (dh,) = torch.autograd.grad(activated, leaf, da)
        dx.index_add_(0, token, dh @ gate_up)
    return dx.to(grad.dtype), dweights


def _with_bias(rows: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    return rows if bias is None else rows + bias[expert].float()

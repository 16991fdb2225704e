"""The packed Linear as an operator: for autograd and torch.compile, which need to know its shape and its derivative.

The operator finds the module by a key when it runs, as moestro::experts does. The gradient of x is that of a Linear
with the dequantised weight in x's dtype; quantised activations count as what they stand for.
"""

from __future__ import annotations

from typing import Any

import torch

from moestro.moe.keyed import key_of, module_of


def call(module: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """module.product(x), differentiable in x and bias."""
    result: torch.Tensor = torch.ops.moestro.linear(x, bias, key_of(module), module.out_features)
    return result


@torch.library.custom_op("moestro::linear", mutates_args=())
def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, rows: int) -> torch.Tensor:
    result: torch.Tensor = module_of(key).product(x)
    return result


@_linear.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, key: str, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("moestro::linear_backward", mutates_args=())
def _gradient(grad: torch.Tensor, key: str, columns: int) -> torch.Tensor:
    result: torch.Tensor = grad @ module_of(key).dequantize(grad.dtype)
    return result


@_gradient.register_fake
def _(grad: torch.Tensor, key: str, columns: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, key, _ = inputs
    ctx.key, ctx.columns = key, x.shape[-1]
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    to_x = torch.ops.moestro.linear_backward(grad, ctx.key, ctx.columns) if ctx.needs_input_grad[0] else None
    to_bias = None
    if ctx.bias is not None and ctx.needs_input_grad[1]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias)
    return to_x, to_bias, None, None


_linear.register_autograd(_backward, setup_context=_save)

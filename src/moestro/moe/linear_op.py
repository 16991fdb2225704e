"""The packed Linear as an operator: for autograd and torch.compile, which need to know its shape and its derivative.

The operator finds the module by a key when it runs, as moestro::experts does. The gradient of x is that of a Linear
with the dequantised weight in x's dtype; quantised activations count as what they stand for.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from moestro.errors import BackendError

KEY = "_moestro_key"
_modules: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()


def call(module: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """module.product(x), differentiable in x and bias."""
    # id() makes Dynamo guard on the module, whose key is a constant to it.
    key = key_of(module) if id(module) else ""
    result: torch.Tensor = torch.ops.moestro.linear(x, bias, key, module.out_features)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def key_of(module: Any) -> str:
    """What the operator finds a module by: one for each module, another one for its copy."""
    key: str | None = module.__dict__.get(KEY)
    if key is None or _modules.get(key) is not module:
        key = f"linear {id(module)}"
        module.__dict__[KEY] = key
        _modules[key] = module
    return key


def _module(key: str) -> Any:
    module = _modules.get(key)
    if module is None:
        raise BackendError(
            "the Linear of this graph is gone; compile the model again (torch._dynamo.reset())"
        )
    return module


@torch.library.custom_op("moestro::linear", mutates_args=())
def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: str, rows: int) -> torch.Tensor:
    result: torch.Tensor = _module(key).product(x)
    return result


@_linear.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, key: str, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("moestro::linear_backward", mutates_args=())
def _gradient(grad: torch.Tensor, key: str, columns: int) -> torch.Tensor:
    result: torch.Tensor = grad @ _module(key).dequantize(grad.dtype)
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

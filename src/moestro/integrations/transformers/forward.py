"""What Transformers calls for an experts module: the layer, or under autograd and torch.compile an operator around it.

The operator moestro::experts takes the module by a key and finds its layer when it runs, so a compiled model needs
no call beforehand and sees weights that were written since. Its derivative is the module's own: the backward pass
computes Transformers' experts again and differentiates them (in the parameters, too). Frozen packed experts are
dequantised for that, a layer at a time, and give the gradients of x and of the routing weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn.utils import parametrize

from moestro.errors import BackendError
from moestro.integrations.transformers.bound import bind, bound_to
from moestro.integrations.transformers.modules import weight_names
from moestro.integrations.transformers.packed import dense_parameters
from moestro.integrations.transformers.settings import REGISTERED, Settings
from moestro.moe.keyed import key_of, module_of
from moestro.moe.layer import FusedMoE


def experts_forward(
    name: str,
    module: Any,
    hidden_states: torch.Tensor,  # [N, H]
    top_k_index: torch.Tensor,  # [N, K]
    top_k_weights: torch.Tensor,  # [N, K], in any floating dtype
) -> torch.Tensor:
    """[N, H]: what module computes, under the settings registered as `name`."""
    if torch.is_grad_enabled():
        weights = _differentiable(module)
        if weights or hidden_states.requires_grad or top_k_weights.requires_grad:
            return _operator(name, module, hidden_states, top_k_index, top_k_weights, weights)
    if torch.compiler.is_compiling():
        return _operator(name, module, hidden_states, top_k_index, top_k_weights, [])
    return run(module, hidden_states, top_k_index, top_k_weights, REGISTERED[name])


def run(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """The layer's result; longer batches than a layer takes are cut."""
    norm = (
        getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
    )
    layer = bind(module, 1 if norm is not None else top_k_index.shape[-1], settings)
    x, ids, weights = hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.float().contiguous()
    if norm is not None:
        return _with_norm(layer, norm, x, ids, weights)
    return _cut(layer, x, ids, weights)


def _cut(layer: FusedMoE, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    size = layer.max_num_tokens
    with torch.no_grad():
        if len(x) <= size:
            return layer(x, ids, weights)  # type: ignore[no-any-return]
        cuts = [slice(at, at + size) for at in range(0, len(x), size)]
        return torch.cat([layer(x[cut], ids[cut], weights[cut]) for cut in cuts])


def _with_norm(
    layer: FusedMoE, norm: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts whose result is normalised before it is weighted: one pair a row, then norm and sum."""
    tokens, top_k = ids.shape
    pairs = _cut(layer, x.repeat_interleave(top_k, 0), ids.view(-1, 1), torch.ones_like(weights).view(-1, 1))
    here = (ids < layer.weights.num_experts).view(-1, 1)  # an expert elsewhere gives nothing, not norm(0)
    summed: torch.Tensor = (norm(pairs).float() * (weights.view(-1, 1) * here)).view(tokens, top_k, -1).sum(1)
    return summed.to(x.dtype)


def _differentiable(module: Any) -> list[torch.Tensor]:
    """The weights as they are now, where one of them wants a gradient."""
    if not any(p.requires_grad for p in module.parameters()) and "parametrizations" not in module._modules:
        return []
    weights = [getattr(module, name) for name in weight_names(module)]
    return weights if any(w.requires_grad for w in weights) else []


# --- the operator ----------------------------------------------------------------------------------------
def _operator(
    name: str,
    module: Any,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.moestro.experts(x, ids, weights, params, key_of(module), name)
    return result


@torch.library.custom_op("moestro::experts", mutates_args=())
def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, params: list[torch.Tensor], key: str, name: str
) -> torch.Tensor:
    module = module_of(key)
    return run(module, x, ids, weights, REGISTERED[name])


@_experts.register_fake
def _(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, params: Any, key: str, name: str
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("moestro::experts_backward", mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
    key: str,
) -> list[torch.Tensor]:
    # An operator's own thread has autograd switched off below it; another one has not.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_gradients, grad, x, ids, weights, params, key).result()


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
    key: str,
) -> list[torch.Tensor]:
    """Of x, weights and params, by way of Transformers' own experts."""
    module = module_of(key)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (x, weights, *params)]
        y = _theirs(module, leaves[0], ids, leaves[1], leaves[2:])
        got = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(leaves, got, strict=True)]


@_backward_op.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, params: Any, key: str
) -> Any:
    return [torch.empty_like(t) for t in (x, weights, *params)]


def _theirs(
    module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, params: Any
) -> torch.Tensor:
    """Transformers' own experts, with these tensors for the module's weights."""
    cls: Any = parametrize.type_before_parametrizations(module)
    twin = cls.__new__(cls)
    twin.__dict__ = dict(module.__dict__)
    if params:
        dense = dict(zip(weight_names(module), params, strict=True))
    elif bound_to(module) is not None:
        dense = dense_parameters(
            module, x.dtype
        )  # of packed or quantised experts: the values that they stand for
        x = bound_to(module).weights.scaled_input(x)  # type: ignore[union-attr]
    else:
        dense = {name: getattr(module, name).detach() for name in weight_names(module)}
    twin.__dict__["_parameters"] = {**module._parameters, **dense}
    twin.__dict__["_modules"] = {n: m for n, m in module._modules.items() if n != "parametrizations"}
    result: torch.Tensor = cls.forward.__wrapped__(twin, x, ids, weights)
    return result


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, ids, weights, params, key, name = inputs
    ctx.save_for_backward(x, ids, weights, *params)
    ctx.key, ctx.name = key, name


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, ids, weights, *params = ctx.saved_tensors
    if params and REGISTERED[ctx.name].quantises:
        raise BackendError(
            f"the parameters of {type(module_of(ctx.key)).__name__} want a gradient, and its experts run as "
            f'{REGISTERED[ctx.name].format}: train with experts_implementation="eager", freeze them '
            '(requires_grad_(False)), or register(format="bf16")'
        )
    traced = torch.compiler.is_compiling() or type(grad) is not torch.Tensor
    derive = torch.ops.moestro.experts_backward if traced else _gradients
    grads = derive(grad.contiguous(), x, ids, weights, params, ctx.key)
    return grads[0], None, grads[1], list(grads[2:]), None, None


_experts.register_autograd(_backward, setup_context=_save)

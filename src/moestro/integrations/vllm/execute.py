"""A call of a layer's experts: vLLM's arguments to FusedMoE's, and the operator that torch.compile sees.

Under torch.compile a call is the operator moestro::vllm_experts, which takes no weights: it finds its layer by
name in vLLM's forward context, as vLLM's own operators do. Eagerly it is a plain function.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from moestro.moe.layer import FusedMoE


def run(
    layer: FusedMoE,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    weight_on_input: bool = False,
) -> torch.Tensor:
    """This rank's partial sum for x [N, H]: a new tensor [N, H]. N may be 0.

    weights [N, K] in any floating dtype, ids [N, K] of all ranks' experts; out of range, or in no place of
    expert_map (int32 [E], -1: elsewhere), they contribute nothing. weight_on_input: x is multiplied by the
    routing weight, in x's dtype, and the result is not (K = 1).
    """
    x = x.contiguous()
    if expert_map is not None:
        ids = to_local(ids, expert_map)
    ids, weights = ids.contiguous(), weights.float().contiguous()
    if weight_on_input:
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    out = torch.empty_like(x)
    size, count = layer.max_num_tokens, x.shape[0]
    if 0 < count <= size:  # the usual call: four slices and the module's __call__ took 6.5 of 14 us
        return layer.forward(x, ids, weights, out)
    for at in range(0, count, size):
        cut = slice(at, at + size)
        layer.forward(x[cut], ids[cut], weights[cut], out[cut])
    return out


def to_local(ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """Global expert ids to this rank's; -1 for those of other ranks and those that are none."""
    known = (ids >= 0) & (ids < len(expert_map))
    local = expert_map[ids.clamp(0, len(expert_map) - 1).long()]
    return torch.where(known, local, -1).to(torch.int32)


def call(method: Any, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The experts of vLLM's `layer`, whose method class is ours."""
    if torch.compiler.is_compiling():
        result: torch.Tensor = torch.ops.moestro.vllm_experts(x, weights, ids, layer.layer_name)
        return result
    return method.run(layer, x, weights, ids)  # type: ignore[no-any-return]


def find(name: str) -> Any:
    """The RoutedExperts of this name in the model that is running."""
    context = importlib.import_module("vllm.forward_context").get_forward_context()
    return context.no_compile_layers[name].routed_experts


@torch.library.custom_op("moestro::vllm_experts", mutates_args=())
def _experts_op(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, name: str) -> torch.Tensor:
    layer = find(name)
    result: torch.Tensor = layer.quant_method.run(layer, x, weights, ids)
    return result


@_experts_op.register_fake
def _experts_fake(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)

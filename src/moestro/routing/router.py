"""Routers: logits [N, E] to the top_k experts of each token and their weights.

Each method is what a family of models does after its router's linear layer. All arithmetic is in float32,
whatever the logits' dtype. Nothing waits for the device, so route() runs under torch.compile and in a CUDA
graph; the values of the logits are therefore not checked: NaN logits give NaN weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from moestro.errors import DeviceError, DTypeError, RoutingError, ShapeError, as_count, unknown_name

Routed = tuple[torch.Tensor, torch.Tensor]  # ids int64 [N, K], weights float32 [N, K]

EPSILON = 1e-20  # DeepSeek's guard against a sum of zero


def route(
    logits: torch.Tensor,
    top_k: int,
    method: str = "softmax_renormalize",
    *,
    bias: torch.Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` experts of each token and their weights: (ids int32 [N, K], weights float32 [N, K]).

    logits: bfloat16, float16 or float32 [N, E]. Weights are multiplied by `scale`. Methods:

    - "softmax": softmax over all experts, then the top k (OLMoE).
    - "softmax_renormalize": the same, then divided by their sum (Qwen3-MoE, Mixtral).
    - "topk_softmax": the top k logits, then softmax over those (gpt-oss).
    - "sigmoid": the top k logits, then sigmoid of each (Llama-4, which multiplies the expert's *input* by
      it).
    - "deepseek_v3": sigmoid scores; chosen by score + `bias` (float [E], none by default) among the experts
      of the `top_groups` best of `num_groups` equal groups (1 of 1 by default), a group being as good as the
      sum of its two best; weights are the scores without bias over their sum (DeepSeek-V3 arXiv 2412.19437
      §2.1.2, GLM-4.5, Kimi-K2).

    Raises RoutingError for an unknown method, options that the method does not have, and a top_k that the
    experts do not allow; ShapeError, DTypeError or DeviceError for tensors that do not fit.
    """
    if method not in METHODS:
        raise RoutingError(unknown_name("routing method", method, METHODS))
    top_k = _check_logits(logits, top_k)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise RoutingError(f"scale must be a number, got {scale!r}")
    options = {"bias": bias, "num_groups": num_groups, "top_groups": top_groups}
    given = {name: value for name, value in options.items() if value is not None}
    if method == "deepseek_v3":
        grouping = _check_grouping(logits, top_k, bias, num_groups, top_groups)
        ids, weights = _deepseek_v3(logits.float(), top_k, bias, *grouping)
    elif given:
        raise RoutingError(
            f"{', '.join(given)} must be given only to method 'deepseek_v3', got method {method!r}"
        )
    else:
        ids, weights = METHODS[method](logits.float(), top_k)
    return ids.to(torch.int32), weights if scale == 1.0 else weights * scale


def _softmax(logits: torch.Tensor, top_k: int) -> Routed:
    weights, ids = torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1)
    return ids, weights


def _softmax_renormalize(logits: torch.Tensor, top_k: int) -> Routed:
    ids, weights = _softmax(logits, top_k)
    return ids, weights / weights.sum(-1, keepdim=True)


def _topk_softmax(logits: torch.Tensor, top_k: int) -> Routed:
    best, ids = torch.topk(logits, top_k, dim=-1)
    return ids, torch.softmax(best, dim=-1)


def _sigmoid(logits: torch.Tensor, top_k: int) -> Routed:
    best, ids = torch.topk(logits, top_k, dim=-1)
    return ids, torch.sigmoid(best)


def _deepseek_v3(
    logits: torch.Tensor, top_k: int, bias: torch.Tensor | None, num_groups: int, top_groups: int
) -> Routed:
    scores = torch.sigmoid(logits)  # [N, E]
    choice = scores if bias is None else scores + bias.float()
    if top_groups < num_groups:
        num_tokens, num_experts = logits.shape
        groups = choice.view(num_tokens, num_groups, num_experts // num_groups)
        rank = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)  # [N, G]
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(
            1, rank.topk(top_groups, dim=-1).indices, True
        )
        choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    ids = torch.topk(choice, top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + EPSILON)


METHODS: Final[dict[str, Callable[..., Routed]]] = {
    "softmax": _softmax,
    "softmax_renormalize": _softmax_renormalize,
    "topk_softmax": _topk_softmax,
    "sigmoid": _sigmoid,
    "deepseek_v3": _deepseek_v3,
}


def _check_logits(logits: torch.Tensor, top_k: int) -> int:
    if not isinstance(logits, torch.Tensor):
        raise DTypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise DTypeError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if logits.ndim != 2:
        raise ShapeError(f"logits must have shape [N, E], got {list(logits.shape)}")
    return check_top_k(top_k, logits.shape[1])


def check_top_k(top_k: int, num_experts: int) -> int:
    """top_k as an int. RoutingError unless it is one and a token can have so many distinct experts."""
    count = as_count("top_k", top_k, RoutingError, least=None)
    if not 1 <= count <= num_experts:
        raise RoutingError(f"top_k must be from 1 to the number of experts, {num_experts}, got {top_k}")
    return count


def _check_grouping(
    logits: torch.Tensor,
    top_k: int,
    bias: torch.Tensor | None,
    num_groups: int | None,
    top_groups: int | None,
) -> tuple[int, int]:
    """(num_groups, top_groups) of "deepseek_v3" with their defaults, if they and the bias fit."""
    num_experts = logits.shape[1]
    if bias is not None:
        _check_bias(bias, logits)
    groups = 1 if num_groups is None else as_count("num_groups", num_groups, RoutingError, least=None)
    top = groups if top_groups is None else as_count("top_groups", top_groups, RoutingError, least=None)
    if groups < 1 or num_experts % groups:
        raise RoutingError(f"num_groups must divide the number of experts, {num_experts}, got {groups}")
    if not 1 <= top <= groups:
        raise RoutingError(f"top_groups must be from 1 to num_groups, {groups}, got {top}")
    if top_k > top * (num_experts // groups):
        raise RoutingError(
            f"top_k must be at most {top} · {num_experts // groups}, the experts of kept groups, got {top_k}"
        )
    return groups, top


def _check_bias(bias: torch.Tensor, logits: torch.Tensor) -> None:
    num_experts = logits.shape[1]
    if not bias.is_floating_point():
        raise DTypeError(f"bias must be floating point, got {bias.dtype}")
    if bias.shape != (num_experts,):
        raise ShapeError(f"bias must have shape [{num_experts}] (one per expert), got {list(bias.shape)}")
    if bias.device != logits.device:
        raise DeviceError(f"bias must be on {logits.device}, where logits is, got {bias.device}")

"""The keywords of a call, and the problem that they make of some weights."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from moestro.errors import BackendError, DTypeError, RoutingError, as_count, as_flag
from moestro.kernels.activations import Activation, GeGLUTanh, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.moe.checks import X_DTYPES, Limits, check_input_format, check_top_k, checked_activation
from moestro.moe.weights import ExpertWeights

MOST_EXPERTS = 1 << 31  # ids are int32 in kernels


@dataclass(frozen=True)
class Options:
    """The keywords of fused_moe that are fixed for a layer."""

    activation: str | Activation = "silu"
    input_format: str | None = None
    expert_offset: int = 0
    deterministic: bool = False
    batch_invariant: bool = False
    backend: str = "auto"
    tactic: Any = None
    num_experts: int | None = None


def limits_of(
    w: ExpertWeights, options: Options, top_k: int | None = None, max_num_tokens: int | None = None
) -> Limits:
    """What calls on these weights must agree with; None: any."""
    return Limits(w.hidden_size, w.device, known_num_experts(options, w), top_k, max_num_tokens)


def known_num_experts(options: Options, w: ExpertWeights) -> int | None:
    """E if it is known: given, or all experts are in `w`."""
    if options.num_experts is not None:
        return as_count("num_experts", options.num_experts, RoutingError, least=0)
    return w.num_experts if options.expert_offset == 0 else None


def make_problem(
    w: ExpertWeights, options: Options, *, top_k: int, dtype: torch.dtype, cuda_graph: bool = False
) -> MoeProblem:
    """The problem of these weights and options. Raises what names the option that does not fit."""
    activation = _activation(options, w)
    check_input_format(options.input_format, hidden_size=w.hidden_size, intermediate_size=w.intermediate_size)
    _check_experts(options, w)
    if dtype not in X_DTYPES:
        raise DTypeError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
    top_k = as_count("top_k", top_k, RoutingError)
    check_top_k(top_k, known_num_experts(options, w))
    if not isinstance(options.tactic, Hashable):
        raise BackendError(f"tactic must be hashable, got {options.tactic!r}")
    if not isinstance(options.backend, str):
        raise BackendError(f"backend must be a name, got {options.backend!r}")
    batch_invariant = as_flag("batch_invariant", options.batch_invariant, BackendError)
    deterministic = as_flag("deterministic", options.deterministic, BackendError)
    return MoeProblem.of(
        w,
        num_experts=None if options.num_experts is None else operator.index(options.num_experts),
        expert_offset=operator.index(options.expert_offset),
        top_k=top_k,
        activation=activation,
        input_format=options.input_format,
        dtype=dtype,
        deterministic=deterministic or batch_invariant,
        cuda_graph=cuda_graph and w.device.type == "cuda",
        batch_invariant=batch_invariant,
    )


def _activation(options: Options, w: ExpertWeights) -> Activation:
    activation = checked_activation(options.activation, w.gate_up.shape, w.intermediate_size)
    if w.up_has_down_pre_scale and activation not in (SwiGLU(), GeGLUTanh()):
        raise BackendError(
            f"activation must be linear in up where the weights have a scale of down's input (AWQ), got {activation}"
        )
    return activation


def _check_experts(options: Options, w: ExpertWeights) -> None:
    offset = as_count("expert_offset", options.expert_offset, RoutingError, least=0)
    if offset + w.num_experts > MOST_EXPERTS:
        raise RoutingError(
            f"expert_offset must be at most {MOST_EXPERTS - w.num_experts}, since ids are 32-bit integers, got {offset}"
        )
    if options.num_experts is None:
        return
    total = as_count("num_experts", options.num_experts, RoutingError, least=0)
    if total < offset + w.num_experts:
        raise RoutingError(
            f"num_experts must be an integer of at least {offset + w.num_experts} (expert_offset {offset} + "
            f"{w.num_experts} experts in w), got {total!r}"
        )

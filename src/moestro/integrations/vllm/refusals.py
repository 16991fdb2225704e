"""What is left to vLLM, and why: asked before a layer has weights, from its FusedMoEConfig alone."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moestro.errors import MoestroError
from moestro.integrations.vllm import log
from moestro.integrations.vllm.activation import activation_of
from moestro.integrations.vllm.kinds import Kind
from moestro.integrations.vllm.settings import Settings
from moestro.kernels import backends
from moestro.kernels.problem import MoeProblem
from moestro.moe.layer import FusedMoE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How tokens may travel between ranks: by collectives of whole batches, which leave [N, H] and [N, K] as they are
EXCHANGES = ("allgather_reducescatter", "naive")


def why_not(kind: Kind, settings: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the layer that vLLM makes with these arguments stays vLLM's; None if we serve it."""
    if kind.format not in settings.kinds:
        return f"MOESTRO_VLLM={os.environ.get('MOESTRO_VLLM', '1')} does not name them"
    moe = kind.moe_of(*args, **kwargs)
    checks: tuple[Callable[[Any], str | None], ...] = (_features, _exchange, _numbers, _invariance)
    for check in checks:
        if reason := check(moe):
            return reason
    return kind.why_not(*args, **kwargs) or _backend(moe, kind, settings)


def _features(moe: Any) -> str | None:
    if moe.is_lora_enabled:
        return "LoRA is on, and packed experts take no adapters"
    if moe.moe_parallel_config.enable_eplb:
        return "EPLB moves experts between ranks while it serves, and packed experts stay where they are"
    if (moe.elastic_ep_max_dp_size or 1) > moe.moe_parallel_config.dp_size:
        return "elastic expert parallelism changes a layer's experts while it serves"
    if moe.moe_backend != "auto":
        return f"moe_backend={moe.moe_backend!r} asks for a backend of vLLM's"
    return None


def _exchange(moe: Any) -> str | None:
    parallel = moe.moe_parallel_config
    if parallel.use_passthrough_all2all:
        return "all2all_backend 'passthrough' leaves the exchange of tokens to the experts"
    if parallel.use_all2all_kernels and parallel.all2all_backend not in EXCHANGES:
        return (
            f"all2all_backend {parallel.all2all_backend!r} hands over tokens in a layout of its own; "
            f"served are {' and '.join(map(repr, EXCHANGES))}"
        )
    return None


def _numbers(moe: Any) -> str | None:
    if moe.in_dtype not in DTYPES:
        return f"x in {moe.in_dtype} is not served; bfloat16, float16 and float32 are"
    activation = activation_of(moe)
    return activation if isinstance(activation, str) else None


def _invariance(moe: Any) -> str | None:
    if wants_batch_invariance() and not has_batch_invariance():
        return "VLLM_BATCH_INVARIANT asks for rows that do not depend on the batch, which this version lacks"
    return None


def wants_batch_invariance() -> bool:
    """Whether vLLM was asked for bit-equal rows in any batch."""
    try:
        envs = importlib.import_module("vllm.envs")
    except ImportError:
        return False
    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def has_batch_invariance() -> bool:
    """Whether this version's layers can give such rows."""
    return "batch_invariant" in inspect.signature(FusedMoE).parameters


def _backend(moe: Any, kind: Kind, settings: Settings) -> str | None:
    try:
        problem = problem_of(moe, kind)
    except MoestroError as error:
        return str(error)
    reasons = {name: backends.why_not(name, problem) for name in backends.BACKENDS}
    able = [name for name, reason in reasons.items() if reason is None]
    kernels = [name for name in able if name != "portable"]
    device = "cpu" if problem.device == "cpu" else "triton"
    if kernels:
        return None
    if not able or kind.vllm_runs:
        return f"no kernel of ours runs them ({device}: {reasons[device]})"
    log.warning(
        f"{kind.format} experts run on the portable backend, which is slow: {device}: {reasons[device]}"
    )
    return None


def problem_of(moe: Any, kind: Kind) -> MoeProblem:
    """The problem of a FusedMoEConfig, with activations in 16 bits. ShapeError for sizes of no whole blocks."""
    kind.check_sizes(moe.hidden_dim, moe.intermediate_size_per_partition)
    activation = activation_of(moe)
    assert not isinstance(activation, str)
    invariant: dict[str, Any] = {"batch_invariant": True} if wants_batch_invariance() else {}
    return MoeProblem(
        num_experts=moe.num_experts,
        num_local_experts=moe.num_local_experts,
        expert_offset=0,
        top_k=moe.experts_per_token,
        hidden_size=moe.hidden_dim,
        intermediate_size=moe.intermediate_size_per_partition,
        weight_format=kind.format,
        activation=activation,
        dtype=moe.in_dtype,
        device=torch.device(moe.device).type,
        weight_dtype=moe.in_dtype if kind.format == "bf16" else None,
        biased=moe.has_bias,
        **invariant,
    )

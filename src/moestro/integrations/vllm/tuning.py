"""Decisions before serving: from the shipped bundles and the store, else measured within MOESTRO_VLLM_TUNE_S.

A layer is tuned right after its weights are packed, before anything is captured. Layers of equal sizes share
decisions: the first pays. With several ranks one decision holds for all or nothing is tuned.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from typing import Any

from moestro.integrations.vllm import log
from moestro.integrations.vllm.settings import Settings
from moestro.moe.layer import FusedMoE
from moestro.tuning import AutoTuner

SIZES = (1, 16, 256, 2048)  # tokens whose decisions the log names
_spent = 0.0  # seconds of this process


@functools.cache
def _tuner_of(store: str) -> AutoTuner:
    return AutoTuner(store=store)


def tuner(settings: Settings) -> AutoTuner:
    """The process's tuner, or the one of MOESTRO_VLLM_STORE."""
    return AutoTuner.get() if settings.store is None else _tuner_of(settings.store)


def prepare(layer: FusedMoE, moe: Any, settings: Settings) -> None:
    """Tune a layer within what is left of the process's seconds."""
    global _spent
    left = settings.tune_s - _spent
    if left <= 0:
        return
    options = _group_options(layer, moe)
    if options is None:
        return
    began = time.monotonic()
    layer.tune(budget_s=left, progress=False, **options)
    _spent += time.monotonic() - began


def _group_options(layer: FusedMoE, moe: Any) -> dict[str, Any] | None:
    """What makes the ranks of a layer decide together; None where they cannot."""
    parallel = moe.moe_parallel_config
    if parallel.tp_size * parallel.ep_size * parallel.dp_size * parallel.pcp_size == 1:
        return {}
    if "group" not in inspect.signature(layer.tune).parameters:
        log.warning("MOESTRO_VLLM_TUNE_S is not followed on several ranks: they could not decide as one")
        return None
    distributed = importlib.import_module("vllm.distributed")
    group = distributed.get_ep_group() if parallel.use_ep else distributed.get_tp_group()
    return {"group": group.cpu_group}


def report(layer: FusedMoE, kind: str) -> None:
    """One line for each kind of layer: what serves it."""
    w, size = layer.weights, layer.max_num_tokens
    sizes = sorted({*(n for n in SIZES if n < size), size})
    words = [f"{n}: {_words(layer, n)}" for n in sizes]
    log.info(
        f"serves {kind} experts (E {layer.options.num_experts}, local {w.num_experts}, K {layer.top_k}, "
        f"H {w.hidden_size}, I {w.intermediate_size}, {w.nbytes} bytes a layer) on the {layer.runners[0].backend} "
        f"backend; decisions by tokens: {'; '.join(words)}"
    )


def _words(layer: FusedMoE, num_tokens: int) -> str:
    decision = layer.decision(num_tokens)
    if decision is None:
        return "the default (nothing was measured)"
    return f"{decision.tactic} ({decision.status} at {decision.bucket})"

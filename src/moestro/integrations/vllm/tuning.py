"""Decisions before serving: from the shipped bundles and the store, else measured within MOESTRO_VLLM_TUNE_S.

A layer is settled right after its weights are packed, before anything is captured. Layers of equal sizes share
decisions: the first pays. Ranks that share a layer begin by exchanging what they know, so that one decision
holds for all of them; where that fails (a rank does not come, ranks want different things) none does, and every
rank that can say so takes the default tactic.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from moestro.errors import GroupError, TuningError
from moestro.integrations.vllm import log, ranks
from moestro.integrations.vllm.settings import Settings
from moestro.moe.layer import FusedMoE
from moestro.tuning import AutoTuner
from moestro.tuning.link import Link

SIZES = (1, 16, 256, 2048)  # tokens whose decisions the log names
_spent = 0.0  # seconds of this process
_settled: dict[tuple[int, str], bool] = {}  # (link, layer's sizes) -> whether its ranks decide as one


@functools.cache
def _tuner_of(store: str) -> AutoTuner:
    return AutoTuner(store=store)


def tuner(settings: Settings) -> AutoTuner:
    """The process's tuner, or the one of MOESTRO_VLLM_STORE."""
    return AutoTuner.get() if settings.store is None else _tuner_of(settings.store)


def settle(layer: FusedMoE, moe: Any, settings: Settings) -> bool:
    """Tune a layer within what is left of the process's seconds, with its other ranks if it has any.

    False where those could not agree: the layer has to take its default tactic.
    """
    try:
        link = ranks.link(moe)
    except (AssertionError, TuningError) as error:
        log.warning(f"the default tactic serves on all ranks: they cannot talk ({error})")
        return False
    left = max(0.0, settings.tune_s - _spent)
    if link is None:
        if left > 0:
            _tune(layer, left)
        return True
    at = id(link), f"{layer.weights!r} {layer.top_k} {layer.max_num_tokens} {layer.options}"
    if at not in _settled:
        _settled[at] = _together(layer, moe, link, left)
    return _settled[at]


def _together(layer: FusedMoE, moe: Any, link: Link, left: float) -> bool:
    """One decision for all ranks; False, with a warning, if there is none."""
    reason = ""
    try:
        said = link.exchange("layer", {"seconds": left, "experts": layer.weights.num_experts})
        empty = [rank for rank, one in enumerate(said) if not one["experts"]]
        if empty:
            reason = f"ranks {', '.join(map(str, empty))} have no experts"
        else:
            _tune(layer, min(one["seconds"] for one in said), link)
            reason = getattr(link, "broken", "")
    except (GroupError, TuningError) as error:
        reason = str(error)
    if reason:
        log.warning(f"the default tactic serves on all {link.size} ranks of a layer: {reason}")
    return not reason


def _tune(layer: FusedMoE, seconds: float, link: Link | None = None) -> None:
    global _spent
    began = time.monotonic()
    layer.tune(budget_s=seconds, progress=False, group=link)
    _spent += time.monotonic() - began


def report(layer: FusedMoE, kind: str, moe: Any) -> None:
    """One line for each kind of layer: what serves it. `moestro explain --vllm` reads it (served.py)."""
    w, size = layer.weights, layer.max_num_tokens
    sizes = sorted({*(n for n in SIZES if n < size), size})
    words = "; ".join(f"{n}: {_words(layer, n)}" for n in sizes)
    store = layer.tuner.store.root if layer.tuner.store is not None else "none"
    invariant = ", rows the same in any batch" if layer.options.batch_invariant else ""
    log.info(
        f"serves {kind} experts (E {layer.options.num_experts}, local {w.num_experts}, K {layer.top_k}, "
        f"H {w.hidden_size}, I {w.intermediate_size}, {w.nbytes} bytes a layer) on the {layer.runners[0].backend} "
        f"backend{invariant}; decisions by tokens{', of all ranks' if ranks.parallel(moe) else ''}: {words}; store: {store}"
    )


def _words(layer: FusedMoE, num_tokens: int) -> str:
    if layer.options.tactic is not None:
        return "the default (the ranks did not agree)"
    decision = layer.decision(num_tokens)
    if decision is None:
        return "the default (nothing was measured)"
    return f"{decision.tactic} ({decision.status} at {decision.bucket})"

"""What test_ranks.py runs in processes of its own: functions of (group, ...), found by name there."""

from __future__ import annotations

import logging
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Lines(logging.Handler):
    """The plugin's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(group: Any, wait_s: float = 30.0) -> Lines:
    """vLLM's group and a fresh plugin, in a rank."""
    from moestro.integrations.vllm import log, ranks, tuning

    distributed = types.ModuleType("vllm.distributed")
    distributed.get_ep_group = lambda: SimpleNamespace(cpu_group=group)  # type: ignore[attr-defined]
    sys.modules["vllm.distributed"] = distributed
    log.forget()
    ranks.forget()
    ranks.WAIT_S = wait_s
    tuning._spent = 0.0
    tuning._settled.clear()
    lines = Lines()
    log.LOGGER.setLevel(logging.INFO)
    log.LOGGER.handlers[:] = [lines]
    return lines


def layer_of(store: Path, tune_s: float, cut: bool = True, local: int = 4) -> Any:
    """A processed layer of this rank."""
    from stand_ins import Config, Dense, Parallel, RoutedExperts, load, method_classes, quant_config

    from moestro.integrations.vllm import hooks, kinds
    from moestro.integrations.vllm.settings import Settings

    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings(store=str(store), tune_s=tune_s))
    parallel = Parallel(tp_size=2) if cut else Parallel()
    moe = Config(max_num_tokens=4, num_local_experts=local, moe_parallel_config=parallel)
    layer = RoutedExperts(cls(quant_config(), moe))
    load(layer, **Dense.random(moe, experts=local).nvfp4())
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.experts


def decisions(experts: Any) -> list[Any]:
    found = [experts.decision(n) for n in (1, 2, 4)]
    return [None if d is None else (repr(d.tactic), d.status) for d in found]


def of_different_stores(group: Any, root: Path) -> tuple[list[Any], list[str]]:
    store = root / f"rank{group.rank()}"
    lines = start(group)
    if group.rank() == 0:
        layer_of(store, 2.0, cut=False)
    experts = layer_of(store, 0.0)
    return decisions(experts), lines.lines


def of_different_seconds(group: Any, root: Path) -> tuple[list[Any], float]:
    start(group)
    began = time.monotonic()
    experts = layer_of(root / f"rank{group.rank()}", 3.0 if group.rank() == 0 else 0.0)
    return decisions(experts), time.monotonic() - began


def tuned_together(group: Any, root: Path) -> list[Any]:
    start(group)
    return decisions(layer_of(root / f"rank{group.rank()}", 3.0))


def with_an_empty_rank(group: Any, root: Path) -> tuple[Any, list[str]]:
    lines = start(group)
    import torch

    experts = layer_of(root / f"rank{group.rank()}", 3.0, local=4 if group.rank() == 0 else 0)
    y = experts(torch.ones(3, 64, dtype=torch.bfloat16), torch.full((3, 2), -1), torch.ones(3, 2))
    assert not y.any()
    return experts.options.tactic, lines.lines


def left_alone(group: Any, root: Path) -> tuple[Any, list[str], float]:
    from stand_ins import Config, Parallel

    from moestro.integrations.vllm import ranks

    lines = start(group, wait_s=2.0)
    began = time.monotonic()
    if group.rank() == 1:
        ranks.link(Config(moe_parallel_config=Parallel(tp_size=2)))
        return None, [], 0.0
    layer_of(root, 1.0, cut=False)  # what this rank knows must not serve either
    tactics = [layer_of(root, 3.0).options.tactic for _ in range(3)]
    return tactics, lines.lines, time.monotonic() - began

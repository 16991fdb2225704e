"""The ranks that hold shares of one layer, and how they talk before it serves.

vLLM's expert-parallel group has them all: with tensor parallelism, too, experts are cut over all data-parallel,
context-parallel and tensor-parallel ranks (FusedMoEParallelConfig.make). They talk over the group's c10d store
(tuning/link.py), with a time-out of our own: a rank that left the layer to vLLM never comes.
"""

from __future__ import annotations

import importlib
from typing import Any

from moestro.tuning.link import Link, link_of

WAIT_S = 300.0  # for the slowest rank to have read and packed its weights
_links: dict[int, tuple[Any, Link]] = {}  # by id of the group, which is kept


def parallel(moe: Any) -> bool:
    """Whether a layer of this FusedMoEConfig is cut over ranks."""
    of = moe.moe_parallel_config
    return bool(of.tp_size * of.ep_size * of.dp_size * of.pcp_size > 1)


def link(moe: Any) -> Link | None:
    """How the ranks of a layer talk, the same for all layers; None where it is on one rank.

    Raises TuningError for a group without a store, AssertionError where vLLM has made no group.
    """
    if not parallel(moe):
        return None
    group = importlib.import_module("vllm.distributed").get_ep_group().cpu_group
    if id(group) not in _links:
        _links[id(group)] = group, link_of(group, WAIT_S)
    return _links[id(group)][1]


def forget() -> None:
    """Make links anew (tests)."""
    _links.clear()

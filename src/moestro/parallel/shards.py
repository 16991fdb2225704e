"""One rank's experts: which of a layer's weights it keeps, checked against what the other ranks have.

A layer comes either whole (every rank holds all experts; each keeps its own) or as this rank's shard, with
expert_offset= and num_experts= as for a single rank, or, with an explicit placement, the experts of
placement.slots(rank) in that order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moestro.errors import RoutingError
from moestro.moe.layer import FusedMoE
from moestro.moe.weights import SIDE_TENSORS, ExpertWeights
from moestro.parallel.peers import Peers
from moestro.parallel.placement import Placement

__all__ = ["local_layer", "take_experts"]

PER_EXPERT = ("gate_up_bias", "down_bias", "gate_up_input_scale", "down_input_scale")


def local_layer(
    layer: FusedMoE, peers: Peers, placement: Any, facts: dict[str, Any]
) -> tuple[FusedMoE, Placement]:
    """(the layer of this rank's experts for all ranks' tokens, the placement).

    facts: what must be the same on all ranks, besides the layer's own. Raises RoutingError, on all ranks,
    where the ranks' layers do not make one.
    """
    said = peers.link.exchange("expert parallel", _facts(layer, placement, facts))
    for name in said[0]["same"]:
        values = [one["same"][name] for one in said]
        if any(value != values[0] for value in values):
            raise RoutingError(
                f"{name} must be the same on all ranks of a group, got {dict(enumerate(values))}"
            )
    shards = [(one["offset"], one["experts"]) for one in said]
    total = _total(shards, said[0]["num_experts"], placement)
    whole = all(shard == (0, total) for shard in shards)
    if placement is not None:
        placement = Placement.of(placement, total, peers.size)
    elif whole:
        placement = Placement.contiguous(total, peers.size)
    else:
        placement = _placement_of(shards, total)
    held = [len(placement.slots(rank)) for rank in range(peers.size)]
    if not whole and held != [experts for _, experts in shards]:
        raise RoutingError(
            f"each rank's layer must hold all {total} experts or those of its slots, {held}, got "
            f"{[experts for _, experts in shards]}"
        )
    if 0 in held:
        raise RoutingError(f"every rank must hold at least one expert, got {held} slots")
    weights = layer.weights
    if whole and peers.size > 1:
        weights = take_experts(weights, placement.slots(peers.rank))
    return _layer_of(layer, weights, placement, peers), placement


def take_experts(w: ExpertWeights, experts: tuple[int, ...]) -> ExpertWeights:
    """The weights of some experts, in the checkpoint layout, as a copy."""
    w = w.unpacked()
    parts = [type(t).stack([t.expert(e) for e in experts]) for t in (w.gate_up, w.down)]  # type: ignore[attr-defined]
    index = torch.tensor(experts, device=w.device)
    side = {name: getattr(w, name) for name in SIDE_TENSORS}
    for name in PER_EXPERT:
        if side[name] is not None and side[name].ndim:  # an input scale may be one for all
            side[name] = side[name][index]
    return ExpertWeights(*parts, **side)


def _facts(layer: FusedMoE, placement: Any, facts: dict[str, Any]) -> dict[str, Any]:
    w, options = layer.weights, dataclasses.asdict(layer.options)
    offset, num_experts = options.pop("expert_offset"), options.pop("num_experts")
    same = {
        "top_k": layer.top_k,
        "max_num_tokens": layer.max_num_tokens,
        "use_cuda_graph": layer.use_cuda_graph,
        "dtype": str(layer.dtype),
        "sizes": [w.hidden_size, w.intermediate_size, w.format],
        "options": {name: repr(value) for name, value in options.items()},
        "num_experts": num_experts,
        "placement": placement if placement is None else repr(placement),
        **facts,
    }
    return {"same": same, "offset": offset, "experts": w.num_experts, "num_experts": num_experts}


def _total(shards: list[tuple[int, int]], num_experts: int | None, placement: Any) -> int:
    """E: as the layers say, else as the placement has it, else where the last shard ends."""
    if num_experts is not None:
        return num_experts
    if placement is not None:
        return len(placement)
    return max(offset + experts for offset, experts in shards)


def _placement_of(shards: list[tuple[int, int]], total: int) -> Placement:
    """From every rank's range of experts; ranges that overlap are replicas."""
    held: list[list[int]] = [[] for _ in range(total)]
    for rank, (offset, experts) in enumerate(shards):
        for expert in range(offset, min(total, offset + experts)):
            held[expert].append(rank)
    if missing := [expert for expert, ranks in enumerate(held) if not ranks]:
        raise RoutingError(
            f"ranks must hold all {total} experts between them, got ranges {shards} (expert_offset, experts) "
            f"without {missing[:8]}; a placement= says where they are"
        )
    return Placement(tuple(map(tuple, held)), len(shards))


def _layer_of(layer: FusedMoE, weights: ExpertWeights, placement: Placement, peers: Peers) -> FusedMoE:
    """A layer on these weights that takes all ranks' tokens at once."""
    start = placement.start(peers.rank)
    options = {
        **vars(layer.options),
        "expert_offset": 0 if start is None else start,
        # Without a start ids are slots, and E only says how thin this rank's share of the pairs is.
        "num_experts": placement.num_experts,
    }
    return FusedMoE(
        weights,
        layer.top_k,
        layer.max_num_tokens * peers.size,
        layer.use_cuda_graph,
        **options,
        dtype=layer.dtype,
        tuner=layer.tuner,
    )

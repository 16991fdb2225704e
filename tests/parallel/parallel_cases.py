"""What each rank does in the tests of expert parallelism: module-level functions, for processes call them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import moestro
from moestro import ExpertWeights, FusedMoE, reference
from moestro.parallel import ExpertParallel
from moestro.parallel.peers import Peers
from moestro.tuning import AutoTuner, MeasurementPolicy

E, K, H, I = 8, 3, 48, 32  # noqa: E741
MOST = 1024
TIGHT = 2e-5  # float32 throughout; what differs is the order of sums
QUICK = MeasurementPolicy(max_rounds=6, max_seconds=1.0, cold_cache=False)


def weights_of_all(
    fmt: str = "bf16", dtype: torch.dtype = torch.float32, experts: int = E, bias: bool = False
) -> ExpertWeights:
    g = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(experts, 2 * I, H, generator=g) * 0.2).to(dtype)
    down = (torch.randn(experts, H, I, generator=g) * 0.2).to(dtype)
    side: dict[str, Any] = {}
    if bias:
        side = {
            "gate_up_bias": torch.randn(experts, 2 * I, generator=g),
            "down_bias": torch.randn(experts, H, generator=g),
        }
    return ExpertWeights.from_dense(gate_up, down, fmt, **side)


def layer_of(w: ExpertWeights, **options: Any) -> FusedMoE:
    how = {"top_k": K, "max_num_tokens": MOST, "backend": "portable", "dtype": torch.float32, **options}
    return FusedMoE(w, tuner=AutoTuner(policy=QUICK), **how)


def tokens_of(
    rank: int, count: int, routing: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """(x, ids, weights) of one rank."""
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, H, generator=g).to(dtype)
    weights = torch.rand(count, K, generator=g)
    if routing == "one expert":  # every pair of every token: the layer adds them up
        ids = torch.full((count, K), 5, dtype=torch.int32)
    elif routing == "last rank only":
        ids = E - 1 - torch.arange(K, dtype=torch.int32).repeat(count, 1) % 2
    elif routing == "nowhere":
        ids = torch.full((count, K), -1, dtype=torch.int32)
    else:
        ids = moestro.routing.parse(routing).sample(count, E, K, seed=7 + rank)
    return x, ids.contiguous(), weights


def error_of(y: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return float(y.shape != expected.shape)
    return float((y.float() - expected).norm() / expected.norm().clamp(min=1e-6))


def equality(
    group: Any,
    counts: list[int],
    routings: list[str],
    *,
    placement: Any = None,
    whole: bool = True,
    payload: str = "bf16",
    fmt: str = "bf16",
    bias: bool = False,
) -> list[tuple[str, str, float]]:
    """(way, routing, error against the whole layer's float32 reference) of this rank."""
    rank, size = group.rank(), group.size()
    w = weights_of_all(fmt, bias=bias)
    if whole:
        ep = ExpertParallel(layer_of(w), group, placement, payload=payload)
    else:
        mine = slice(rank * E // size, (rank + 1) * E // size)
        g, d = w.dequantize()
        shard = ExpertWeights.from_dense(g[mine], d[mine], fmt)
        ep = ExpertParallel(layer_of(shard, expert_offset=mine.start, num_experts=E), group, placement)
    found = []
    for routing in routings:
        x, ids, weights = tokens_of(rank, counts[rank], routing)
        expected = reference.fused_moe(x, ids, weights, w)
        for way in ("gather", "dispatch"):
            found.append((way, routing, error_of(ep(x, ids, weights, way=way), expected)))
    return found


def slots_equality(group: Any, counts: list[int], placement: Any) -> list[float]:
    """The dispatch of GPUs without symmetric memory, on gloo."""
    from moestro.parallel.dispatch import Slots

    w = weights_of_all()
    ep = ExpertParallel(layer_of(w), group, placement)
    found = []
    for payload in ("bf16", "fp8"):
        ep.ways["dispatch"] = Slots(ep.peers, ep.routes, payload)
        x, ids, weights = tokens_of(group.rank(), counts[group.rank()], "zipf:1.0")
        found.append(error_of(ep(x, ids, weights, way="dispatch"), reference.fused_moe(x, ids, weights, w)))
    return found


def same_bound_without_exchange(group: Any) -> float:
    w = weights_of_all()
    ep = ExpertParallel(layer_of(w), group)
    ep.peers.numbers = None  # type: ignore[assignment]  # not to be called
    x, ids, weights = tokens_of(group.rank(), 3 + group.rank(), "uniform")
    return error_of(ep(x, ids, weights, bound=9, way="gather"), reference.fused_moe(x, ids, weights, w))


def message(group: Any, case: str) -> str:
    """The error that a rank gets when something does not fit."""
    w, rank = weights_of_all(), group.rank()
    try:
        if case == "bound":
            ep = ExpertParallel(layer_of(w), group)
            x, ids, weights = tokens_of(rank, 20, "uniform")
            ep(x, ids, weights, bound=8)
        elif case == "one rank":
            ep = ExpertParallel(layer_of(w, max_num_tokens=16), group)
            x, ids, weights = tokens_of(rank, 17 if rank == 1 else 3, "uniform")
            ep(x, ids, weights)
        elif case == "top_k":
            ExpertParallel(layer_of(w, top_k=K + rank), group)
        elif case == "gap":
            shard = ExpertWeights.from_dense(*(t[:3] for t in w.dequantize()), "bf16")
            ExpertParallel(layer_of(shard, expert_offset=4 * rank, num_experts=E), group)
        elif case == "way":
            ExpertParallel(layer_of(w), group, way="gathr")
        elif case == "placement":
            ExpertParallel(layer_of(w), group, [0] * E)
        elif case == "compute":
            ep = ExpertParallel(layer_of(w), group)
            x, ids, weights = tokens_of(rank, 4, "uniform")
            if rank == 1:
                ep.layer.run = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
            ep(x, ids, weights, way="gather", bound=4)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def tuned(group: Any, store: str) -> Any:
    """(ways and tactics after tuning, the same of a new object from the store, error)."""
    w = weights_of_all()
    layer = layer_of(w, max_num_tokens=16)
    layer.tuner = AutoTuner(f"{store}/{group.rank()}", policy=QUICK)
    ep = ExpertParallel(layer, group)
    ep.tune(progress=False)
    again = ExpertParallel(layer, group)
    x, ids, weights = tokens_of(group.rank(), 5, "uniform")
    wrong = error_of(ep(x, ids, weights), reference.fused_moe(x, ids, weights, w))
    decided = [repr(d.tactic) if (d := ep.layer.decision(n)) else "" for n in (1, 8, 32)]
    ways = [ep.way_for(n) for n in (1, 4, 16)]
    return ways, [again.way_for(n) for n in (1, 4, 16)], decided, wrong


def layer_tune(group: Any, strategy: str) -> list[Any]:
    """What layer.tune(group=) decides, with real timers and this rank's own weights."""
    mine = slice(group.rank() * E // group.size(), (group.rank() + 1) * E // group.size())
    gate_up, down = weights_of_all().dequantize()
    shard = ExpertWeights.from_dense(gate_up[mine], down[mine], "bf16")
    layer = layer_of(shard, expert_offset=mine.start, num_experts=E, max_num_tokens=8)
    layer.tune(progress=False, group=group, strategy=strategy)
    found = [layer.decision(n) for n in (1, 2, 8)]
    return [None if d is None else (type(d.runner).__name__, repr(d.tactic), d.status) for d in found]


def autotune_in_step(group: Any) -> list[Any]:
    """Ranks with different numbers of tokens inside moestro.autotune's context on one tuner."""
    layer = layer_of(weights_of_all(), max_num_tokens=16)
    x, ids, weights = tokens_of(group.rank(), 3 + 6 * group.rank(), "uniform")
    with layer.tuner.autotune(True, group=group, crossover=False, budget_s=100.0):
        layer(x, ids, weights)
    found = [layer.decision(n) for n in (1, 4, 9)]
    return [None if d is None else repr(d.tactic) for d in found]


def differing_ways(group: Any, store: str) -> list[str]:
    """Only rank 0 has a store with ways: none serve."""
    layer = layer_of(weights_of_all(), max_num_tokens=4)
    layer.tuner = AutoTuner(f"{store}/{group.rank()}", policy=QUICK)
    ep = ExpertParallel(layer, group)
    ep.tune(progress=False)
    layer.tuner = layer.tuner if group.rank() == 0 else AutoTuner()
    return [ExpertParallel(layer, group).way_for(2)]


def equality_with(
    group: Any, counts: list[int], routings: list[str], options: dict[str, Any]
) -> list[tuple[str, str, float]]:
    return equality(group, counts, routings, **options)


def rows_held_after_collectives(group: Any, times: int) -> int:
    """Of so many all-to-alls, how many returned while gloo held what it sent or received."""
    peers, seen, held = Peers(group), [], 0

    def recorded(out: torch.Tensor, rows: torch.Tensor, *sizes: Any, **how: Any) -> Any:
        seen[:] = [out, rows]
        return all_to_all(out, rows, *sizes, **how)

    all_to_all = dist.all_to_all_single
    with patch.object(dist, "all_to_all_single", recorded):
        for _ in range(times):
            peers.all_to_all(torch.ones(4 * peers.size, 8))
            held += any(tensor._use_count() > 1 for tensor in seen)  # type: ignore[attr-defined]
    return held

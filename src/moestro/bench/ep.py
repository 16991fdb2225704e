"""Expert parallelism, measured by all its ranks in step: `torchrun ... -m moestro bench ep`.

Contenders, for each number of tokens a rank: the ways of ExpertParallel ("gather", "dispatch", "dispatch fp8"),
"plain" (the all-gather scheme as one writes it in PyTorch, with bf16 weights), and "one rank": the same local
experts on one rank with as many pairs, all local, and no communication: what the ways are held against. A
time is the median over rounds of the slowest rank's. A way's stages (send, compute, back) are timed apart, as
served: each in a CUDA graph of its own where the layer is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moestro.bench.layers import LayerSource, activation_of
from moestro.bench.models import MoeShape
from moestro.moe.layer import FusedMoE
from moestro.moe.weights import ExpertWeights
from moestro.parallel import ExpertParallel, Placement
from moestro.parallel.plain import PlainGather
from moestro.parallel.tuned import LockstepTimer
from moestro.routing import Distribution, sample_weights
from moestro.tuning import AutoTuner

__all__ = ["SCHEMA", "Bench", "EpRow", "EpSpec", "run", "to_json"]

SCHEMA = "moestro.ep/1"


@dataclass(frozen=True)
class EpSpec:
    """What to measure. shape: the whole layer (its E is all ranks')."""

    shape: MoeShape
    tokens: tuple[int, ...]
    routing: Distribution
    format: str = "nvfp4"
    device: str = "cpu"
    seed: int = 0
    rounds: int = 15
    fp8: bool = True
    plain: bool = True
    placement: Placement | None = None
    store: Path | None = None
    budget_s: float | None = 0.0  # of tuning before; None: as long as it takes, 0: none


@dataclass(frozen=True)
class EpRow:
    """One contender at N tokens a rank. Times in seconds."""

    tokens: int
    contender: str
    seconds: float
    low_s: float
    high_s: float
    stages: dict[str, float] = field(default_factory=dict)
    pairs: list[int] = field(default_factory=list)  # that each rank computes
    imbalance: float = 1.0  # the most pairs of a rank over the mean
    tokens_per_s: float = 0.0  # of all ranks
    efficiency: float | None = None  # one rank's time for as many local pairs over this
    difference: float | None = None  # relative error norm to "gather"
    transport: str = ""


def run(spec: EpSpec, group: Any, on_row: Callable[[EpRow], None] = lambda row: None) -> list[EpRow]:
    """Measure on all ranks of the group; every rank gets the rows (on_row as soon as each is known).

    Raises what ExpertParallel raises; GroupError where a rank is lost.
    """
    bench = Bench(spec, group)
    rows: list[EpRow] = []
    for tokens in spec.tokens:
        for row in bench.at(tokens):
            rows.append(row)
            on_row(row)
    return rows


class Bench:
    """One layer on all ranks, and the contenders on it."""

    def __init__(self, spec: EpSpec, group: Any) -> None:
        self.spec, self.group = spec, group
        shape, size, rank = spec.shape, group.size(), group.rank()
        placement = spec.placement or Placement.contiguous(shape.num_experts, size)
        slots = placement.slots(rank)
        source = _SlotSource(replace(shape, num_experts=len(slots)), 0, spec.seed, spec.device, slots=slots)
        weights = source.weights(spec.format)
        dense = weights.dequantize(torch.bfloat16) if spec.plain else None  # the same values for all
        self.eps: dict[str, ExpertParallel] = {"": self._expert_parallel(weights, placement, "bf16")}
        if spec.fp8:
            self.eps[" fp8"] = self._expert_parallel(self.ep.layer.weights, placement, "fp8")
        self.plain = PlainGather(self.ep, dense, activation_of(shape)) if dense is not None else None

    @property
    def ep(self) -> ExpertParallel:
        return self.eps[""]

    def _expert_parallel(self, w: ExpertWeights, placement: Placement, payload: str) -> ExpertParallel:
        spec = self.spec
        start = placement.start(self.group.rank())
        layer = FusedMoE(
            w,
            spec.shape.top_k,
            max(spec.tokens),
            use_cuda_graph=spec.device != "cpu",
            activation=activation_of(spec.shape),
            expert_offset=start or 0,
            num_experts=spec.shape.num_experts,
            tuner=AutoTuner(spec.store) if spec.store else None,
        )
        ep = ExpertParallel(layer, self.group, placement, way="gather", payload=payload)
        if spec.budget_s != 0.0 and payload == "bf16":
            ep.tune(budget_s=spec.budget_s, probes=[spec.routing], progress=False)
        return ep

    def at(self, tokens: int) -> Iterator[EpRow]:
        """The rows for one number of tokens a rank."""
        spec, ep = self.spec, self.ep
        call = self.call(tokens)
        lanes: dict[str, Callable[[], Any]] = {}
        stages: dict[str, dict[str, Callable[[], Any]]] = {}
        outputs: dict[str, torch.Tensor] = {}
        for suffix, one in self.eps.items():
            for way in ("gather", "dispatch") if not suffix else ("dispatch",):
                name = way + suffix
                outputs[name] = torch.empty_like(call[0])
                lanes[name], stages[name] = _whole(one, way, call, outputs[name]), _parts(one, way, call)
        if self.plain is not None:
            outputs["plain"] = torch.empty_like(call[0])
            lanes["plain"] = lambda: self.plain.run(*call, outputs["plain"])  # type: ignore[union-attr]
        lanes["one rank"] = self._one_rank(tokens)
        times = self._race(lanes)
        parts = {name: self._race(of) for name, of in stages.items()}
        pairs = self._pairs(call[1])
        baseline = statistics.median(times["one rank"])
        for name in lanes:
            median = statistics.median(times[name])
            alone = name == "one rank"
            yield EpRow(
                tokens,
                name,
                median,
                min(times[name]),
                max(times[name]),
                {stage: statistics.median(found) for stage, found in parts.get(name, {}).items()},
                [tokens * spec.shape.top_k] if alone else pairs,
                1.0 if alone else max(pairs) / (sum(pairs) / len(pairs)),
                tokens * (1 if alone else ep.peers.size) / median,
                None if alone else baseline / median,
                None if alone else _difference(outputs[name], outputs["gather"]),
                type(ep.ways["dispatch"]).__name__ if name.startswith("dispatch") else "",
            )

    def call(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's x, ids and weights: every rank draws its own tokens from the same distribution."""
        spec, shape, seed = self.spec, self.spec.shape, self.spec.seed
        everybody = spec.routing.sample(tokens * self.group.size(), shape.num_experts, shape.top_k, seed=seed)
        mine = everybody[self.group.rank() * tokens :][:tokens].contiguous()
        g = torch.Generator().manual_seed(seed + 1 + self.group.rank())
        x = torch.randn((tokens, shape.hidden_size), generator=g).to(torch.bfloat16)
        weights = sample_weights(tokens, shape.top_k, seed)
        return x.to(spec.device), mine.to(spec.device), weights.to(spec.device)

    def _one_rank(self, tokens: int) -> Callable[[], Any]:
        """The local experts with the pairs of `tokens` tokens, all local."""
        spec, layer = self.spec, self.ep.layer
        held = layer.weights.num_experts
        ids = (
            spec.routing.sample(tokens, held, spec.shape.top_k, seed=spec.seed) + layer.options.expert_offset
        )
        x, _, weights = self.call(tokens)
        ids = ids.to(torch.int32).to(x.device)
        return lambda: layer.run(x, ids, weights)

    def _pairs(self, ids: torch.Tensor) -> list[int]:
        """Pairs that each rank computes."""
        ep = self.ep
        ranks = ep.routes.ranks(ep.routes.known(ids), ep.peers.rank)
        counts = [int((ranks == rank).sum()) for rank in range(ep.peers.size)]
        said = ep.peers.link.exchange("pairs", counts)
        return [sum(column) for column in zip(*said, strict=True)]

    def _race(self, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds of the slowest rank, per round; the order rotates."""
        timer, link = LockstepTimer(self.ep), self.ep.peers.link
        samplers = {name: timer.prepare(call) for name, call in calls.items()}
        names = list(samplers)
        found: dict[str, list[float]] = {name: [] for name in names}
        started = time.monotonic()
        for turn in range(self.spec.rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            mine = [samplers[name]() for name in order] + [time.monotonic() - started]
            *slowest, spent = (max(column) for column in zip(*link.exchange("bench", mine), strict=True))
            for name, seconds in zip(order, slowest, strict=True):
                found[name].append(seconds)
            if turn >= 4 and spent > 10:  # one answer for all ranks: the slowest rank's clock
                break
        return found


@dataclass(frozen=True)
class _SlotSource(LayerSource):
    """The weights of some of a layer's experts, the same whoever holds them. shape: with as many experts."""

    slots: tuple[int, ...] = ()

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().expert(self.slots[index])


def _whole(
    ep: ExpertParallel, way: str, call: Sequence[torch.Tensor], out: torch.Tensor
) -> Callable[[], Any]:
    x, ids, weights = call
    return lambda: ep.run(ep.ways[way], x, ids, weights, out, x.shape[0])


def _parts(ep: ExpertParallel, way: str, call: Sequence[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The stages of a way, each on what the one before left."""
    x, ids, weights = call
    chosen, out, bound = ep.ways[way], torch.empty_like(x), x.shape[0]
    parcel = chosen.send(x, ids, weights, bound)
    y = ep.layer.run(parcel.x, parcel.ids, parcel.weights, parcel.out)
    chosen.back(y, parcel, out)
    return {
        "send": lambda: chosen.send(x, ids, weights, bound),
        "compute": lambda: ep.layer.run(parcel.x, parcel.ids, parcel.weights, parcel.out),
        "back": lambda: chosen.back(y, parcel, out),
    }


def _difference(output: torch.Tensor, other: torch.Tensor) -> float:
    norm = float(other.float().norm())
    return float((output.float() - other.float()).norm()) / norm if norm else 0.0


def to_json(spec: EpSpec, rows: Sequence[EpRow], size: int, command: str) -> dict[str, Any]:
    """The result as written to a file."""
    from moestro.bench import results

    return {
        "schema": SCHEMA,
        "command": command,
        "date": results.now(),
        "environment": results.environment(spec.device),
        "problem": spec.shape.to_json(),
        "conditions": {
            "ranks": size,
            "format": spec.format,
            "routing": spec.routing.name,
            "seed": spec.seed,
            "rounds": spec.rounds,
            "tuning_budget_s": spec.budget_s,
            "placement": None if spec.placement is None else str(spec.placement),
        },
        "rows": [asdict(row) for row in rows],
    }

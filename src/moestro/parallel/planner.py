"""How long an MoE layer would take on so many GPUs: products, collectives, imbalance and memory, on paper.

Products of a rank: launches + (memory^q + compute^q)^(1/q) + activations, with memory = bytes of the experts
that are hit over the bandwidth, compute = FLOPs over the rate, less the share of a tile that is padding
(1 + pad / pairs an expert), and activations = bytes of rows moved between the stages over the bandwidth. The
five constants of a GPU are fitted to the decisions in this package's bundles: eleven models, 1 to 16384
tokens, 206 (H100) and 223 (H200) medians; half of them are met within 3 %, nine in ten within 16 %.

Collectives: a start and bytes over a rate, the bytes being what one rank sends to others. Fitted to two GPUs of
one host; with more ranks the bytes grow and the rate is assumed to stay: a switch connects all pairs. What was
never run with so many ranks says "on paper".

The routing is sampled, so the load of each rank, who is hit, and how many ranks a token needs are counted, not
assumed; the slowest rank's time is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from moestro.errors import ModelError, unknown_name
from moestro.parallel.placement import Placement, place
from moestro.routing import Distribution

__all__ = ["GPUS", "Gpu", "PlanRow", "PlannedLayer", "best", "collective_seconds", "plan", "product_seconds"]

SAMPLED = 8192  # tokens whose routing is drawn at most; loads of more are these, scaled
RUN_WITH = 2  # ranks that were run here
BYTES = {
    "nvfp4": 0.5625,
    "mxfp4": 0.53125,
    "fp8_block": 1.0,
    "int4": 0.5625,
    "bf16": 2.0,
}  # of a weight, scales included


@dataclass(frozen=True)
class Link:
    """A collective: seconds before the first byte, bytes a second of one rank to the others."""

    start: float
    rate: float

    def seconds(self, num_bytes: float) -> float:
        return self.start + num_bytes / self.rate


@dataclass(frozen=True)
class Gpu:
    """The constants of a GPU, and those of its links."""

    name: str
    launches: float  # seconds of a layer without work
    bandwidth: float  # bytes a second
    rate: float  # FLOPs a second
    pad: float  # pairs of padding an expert
    power: float  # q: how far memory and compute overlap
    activations: float  # how often rows are moved
    memory: float  # bytes
    links: Mapping[str, Link]


# Two H200s of one host, NVLink, multicast off: a step less its experts, halved, over 16 to 4096 rows of 14336
# bytes (benchmarks/results/ep2_h200_deepseek.json).
_NVLINK = MappingProxyType({"gather": Link(42e-6, 195e9), "dispatch": Link(30e-6, 354e9)})
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h100": Gpu("h100", 23.6e-6, 3.03e12, 660e12, 0.30, 1.75, 0.86, 80e9, _NVLINK),
        "h200": Gpu("h200", 25.2e-6, 4.33e12, 645e12, 8.06, 1.53, 0.68, 141e9, _NVLINK),
    }
)


@dataclass(frozen=True)
class PlannedLayer:
    """One MoE layer by its sizes."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    format: str = "nvfp4"

    @property
    def weights_per_expert(self) -> int:
        return self.hidden_size * self.intermediate_size * (3 if self.gated else 2)

    @property
    def bytes_per_expert(self) -> float:
        return self.weights_per_expert * BYTES[self.format]


@dataclass(frozen=True)
class PlanRow:
    """One way to run the layer. Times in seconds, of the slowest rank; memory in bytes a GPU, one layer."""

    ranks: int
    replicas: int
    way: str  # "gather" | "dispatch" | "-" on one rank
    products: float
    send: float
    back: float
    imbalance: float  # pairs of the most loaded rank over the mean
    imbalance_cost: float  # seconds that waiting for it takes
    weight_bytes: float
    buffer_bytes: float
    fits: bool
    basis: str  # "fitted" to runs, or "on paper"

    @property
    def total(self) -> float:
        return self.products + self.send + self.back

    def tokens_per_s(self, tokens: int) -> float:
        """Of one GPU with `tokens` tokens a rank."""
        return tokens / self.total


def product_seconds(gpu: Gpu, layer: PlannedLayer, pairs: float, hit: float, rows: float) -> float:
    """One rank's products: pairs on `hit` experts, for `rows` rows."""
    if not pairs:
        return gpu.launches
    memory = hit * layer.bytes_per_expert / gpu.bandwidth
    flops = 2 * pairs * layer.weights_per_expert
    compute = flops / gpu.rate * (1 + gpu.pad / max(1.0, pairs / max(hit, 1.0)))
    inter = layer.intermediate_size * (3 if layer.gated else 2)
    moved = 2 * (pairs * (2 * layer.hidden_size + inter) + 2 * rows * layer.hidden_size)
    both = (memory**gpu.power + compute**gpu.power) ** (1 / gpu.power)
    return float(gpu.launches + both + gpu.activations * moved / 2.5e12)


def collective_seconds(
    gpu: Gpu, way: str, ranks: int, row_bytes: float, rows: float, needed: float
) -> tuple[float, float]:
    """(send, back) of a way; rows a rank, of which `needed` (a number, over all other ranks) are dispatched."""
    if ranks == 1:
        return 0.0, 0.0
    sent = rows * (ranks - 1) if way == "gather" else needed
    one_way = gpu.links[way].seconds(sent * row_bytes)
    return one_way, one_way


def plan(
    layer: PlannedLayer,
    gpu: str,
    ranks: Iterable[int],
    tokens: int,
    routing: Distribution,
    replicas: Iterable[int] = (0,),
    seed: int = 0,
) -> list[PlanRow]:
    """Rows for each number of ranks, replicas and way, with `tokens` tokens a rank.

    replicas 0 is contiguous shards; more are placed for the routing's loads. Raises ModelError for a GPU or
    format that has no figures.
    """
    if gpu not in GPUS:
        raise ModelError(unknown_name("gpu", gpu, GPUS))
    if layer.format not in BYTES:
        raise ModelError(unknown_name("format", layer.format, BYTES))
    rows = []
    for count in ranks:
        if not 1 <= count <= layer.num_experts:
            raise ModelError(f"ranks must be in 1..{layer.num_experts}, the number of experts, got {count}")
        for copies in replicas if count > 1 else (0,):
            if copies <= layer.num_experts * (count - 1):
                rows += _rows(GPUS[gpu], layer, count, copies, tokens, routing, seed)
    return rows


def best(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row with the most tokens a second a GPU that fits into memory."""
    return min((row for row in rows if row.fits), key=lambda row: row.total, default=None)


def _rows(
    gpu: Gpu, layer: PlannedLayer, ranks: int, replicas: int, tokens: int, routing: Distribution, seed: int
) -> list[PlanRow]:
    drawn = max(1, min(tokens * ranks, SAMPLED))
    ids = routing.sample(drawn, layer.num_experts, layer.top_k, seed=seed)
    loads = ids.flatten().bincount(minlength=layer.num_experts).double()
    placement = place(loads, ranks, replicas) if replicas else Placement.contiguous(layer.num_experts, ranks)
    scale = tokens * ranks / drawn
    each = [pairs * scale for pairs in placement.rank_loads(loads.tolist())]
    hit = [_hit(placement, loads, rank, scale) for rank in range(ranks)]
    times = [product_seconds(gpu, layer, p, h, tokens * ranks) for p, h in zip(each, hit, strict=True)]
    mean = product_seconds(gpu, layer, sum(each) / ranks, sum(hit) / ranks, tokens * ranks)
    needed = tokens * _ranks_a_token(placement, ids)
    row_bytes, slots = 2.0 * layer.hidden_size, max(len(placement.slots(rank)) for rank in range(ranks))
    weights = slots * layer.bytes_per_expert
    found = []
    for way in ("gather", "dispatch") if ranks > 1 else ("-",):
        send, back = collective_seconds(gpu, way, ranks, row_bytes, tokens, needed)
        buffers = (2 if ranks > 1 else 0) * ranks * tokens * row_bytes
        basis = "fitted" if ranks <= RUN_WITH and layer.format == "nvfp4" else "on paper"
        busiest = max(each) / (sum(each) / ranks)
        costs = (max(times), send, back, busiest, max(times) - mean)
        found.append(
            PlanRow(ranks, replicas, way, *costs, weights, buffers, weights + buffers < gpu.memory, basis)
        )
    return found


def _hit(placement: Placement, loads: torch.Tensor, rank: int, scale: float) -> float:
    """Experts of a rank that get pairs: those of the sample, more where it is a part of the tokens."""
    held = list(placement.slots(rank))
    shares = torch.tensor([len(placement.ranks[e]) for e in held], dtype=torch.float64)
    expected = loads[held] / shares * scale
    seen = expected.clamp(max=1) if scale == 1 else 1 - torch.exp(-expected)
    return float(seen.sum())


def _ranks_a_token(placement: Placement, ids: torch.Tensor) -> float:
    """How many other ranks a token of the sample needs, on average; it is on any rank alike."""
    first = torch.tensor([held[0] for held in placement.ranks])
    ranks = first[ids.long()]
    counts = torch.stack([(ranks == rank).any(-1) for rank in range(placement.num_ranks)]).sum(0)
    return float(counts.double().mean()) * (placement.num_ranks - 1) / placement.num_ranks

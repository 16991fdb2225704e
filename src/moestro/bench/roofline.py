"""How fast a call could be here: ceilings measured in the run, bytes and FLOPs counted from the routing.

A call must read the weights of the experts that its pairs hit once, read x and write y once, and do
2·pairs·weights_per_expert FLOPs. The roofline is the larger of bytes / bandwidth and FLOPs / matmul rate; a
contender's fraction is that time over its own. Weights are counted in the format that the contender holds,
so a 4-bit layer is held against its own, smaller, traffic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moestro.bench.layers import Case
from moestro.bench.models import MoeShape

__all__ = ["Ceilings", "Work", "count_work", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best in plain PyTorch."""

    bytes_per_s: float  # the better of a copy (bytes read + written) and a pure read
    flops_per_s: float  # a square matrix product in `dtype`
    dtype: str

    def seconds(self, work: Work) -> float:
        """The roofline of a call."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)

    def raised(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate."""
        rates = max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s)
        return Ceilings(*rates, self.dtype)


@dataclass(frozen=True)
class Work:
    """What a call cannot do without."""

    num_bytes: int
    flops: int
    weight_bytes: int  # the part of num_bytes that is weights
    experts_hit: int
    pairs: int


def count_work(shape: MoeShape, case: Case, layer_bytes: int) -> Work:
    """Bytes and FLOPs of a case on a layer whose L experts take `layer_bytes`."""
    local = case.ids[(case.ids >= 0) & (case.ids < shape.num_local_experts)]
    hit = len(set(local.tolist()))
    weight_bytes = round(layer_bytes / shape.num_local_experts * hit)
    activations = 2 * case.x.numel() * case.x.element_size()  # x once in, y once out
    return Work(
        num_bytes=weight_bytes + activations,
        flops=2 * local.numel() * shape.weights_per_expert,
        weight_bytes=weight_bytes,
        experts_hit=hit,
        pairs=local.numel(),
    )


def measure_ceilings(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Measure bandwidth and matmul rate: the best of a few runs after a warm-up (about a second on two
    cores).
    """
    cuda = device.startswith("cuda")
    size = (1 << 30) if cuda else (128 << 20)  # well beyond any cache
    side = 8192 if cuda else 1024
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    copy = _rate(lambda: target.copy_(source), 2 * size, device)
    read = _rate(lambda: source.sum(), size, device)
    matmul = _rate(lambda: left @ right, 2 * side**3, device)
    return Ceilings(max(copy, read), matmul, str(dtype).removeprefix("torch."))


def _rate(call: Callable[[], torch.Tensor], amount: int, device: str, repeats: int = 7) -> float:
    seconds = []
    for _ in range(2 + repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return amount / min(seconds[2:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

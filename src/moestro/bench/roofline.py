"""How fast a call could be here: ceilings measured in the run, bytes and FLOPs counted from the routing.

A call must read the weights of the experts that its pairs hit once, read x and write y once, and do
2·pairs·weights_per_expert FLOPs. The roofline is the larger of bytes / bandwidth and FLOPs / multiply rate; a
contender's fraction is that time over its own. Weights are counted in the format that the contender holds, so a
4-bit layer is held against its own, smaller, traffic; and products against the rate of the arithmetic that they
are made of, where the contender says which. A fraction above MOST is an error of the bench: no row holds one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moestro import machine
from moestro.bench import cpu_ceilings
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.kernels.cpu import core

__all__ = ["MOST", "Ceilings", "Work", "count_work", "measure_ceilings"]

MOST = 1.05  # of a ceiling: what measuring it may be off


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best."""

    bytes_per_s: float  # a read on a CPU; on a GPU the better of a copy (bytes read + written) and a read
    flops_per_s: (
        float  # the fastest floating-point arithmetic (CPU), or a square matrix product in `dtype` (GPU)
    )
    dtype: str
    rates: dict[str, float] = field(
        default_factory=dict
    )  # operations/s by arithmetic, in the instruction set in use

    def seconds(self, work: Work, arithmetic: str | None = None) -> float:
        """The roofline of a call whose products are made of an arithmetic; None or one not measured: the fastest."""
        rate = self.rates.get(arithmetic or "", self.flops_per_s)
        return max(work.num_bytes / self.bytes_per_s, work.flops / rate)

    def raised(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate."""
        names = {**self.rates, **other.rates}
        rates = {name: max(self.rates.get(name, 0.0), other.rates.get(name, 0.0)) for name in names}
        best = max(self, other, key=lambda ceilings: ceilings.flops_per_s)
        return Ceilings(max(self.bytes_per_s, other.bytes_per_s), best.flops_per_s, best.dtype, rates)


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
    """Measure bandwidth and multiply rates: the best of a few runs after a warm-up (a second or less).

    A CPU's are those of our own kernels (cpu_ceilings.py), whatever `dtype`; a GPU's are a copy, a read, and a square
    product in `dtype`.
    """
    return _of_gpu(device, dtype) if device.startswith("cuda") else _of_cpu()


def _of_cpu() -> Ceilings:
    read = cpu_ceilings.read_rate(machine.cpu().cache_bytes)
    flops, name = cpu_ceilings.best_float_rate()
    has_core = core.why_no_core() is None
    return Ceilings(read, flops, name, cpu_ceilings.arithmetic_rates(core.choose_isa()) if has_core else {})


def _of_gpu(device: str, dtype: torch.dtype) -> Ceilings:
    size, side = 1 << 30, 8192  # well beyond any cache
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
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return amount / min(seconds[2:])

"""A CPU's ceilings, measured by kernels of our own: how fast it reads, and how fast it multiplies in each arithmetic.

A library's matrix product is no ceiling: without bf16 instructions torch multiplies bf16 in a loop at a hundredth of
what the processor does (0.9 GFLOP/s of 104, two Zen 3 cores). The compiled core multiplies registers, in each
instruction set and arithmetic, and reads memory in a stream, on torch's threads (csrc/spin.h, ceilings.cpp). Without
the core, torch's float32 product and sum stand in.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from moestro.kernels.cpu import core

__all__ = ["arithmetic_rates", "best_float_rate", "fallback", "read_rate"]

READ_BYTES = 256 << 20  # beyond the last-level cache of most machines; a larger one is filled four times over
SPIN_S = 0.02  # each thread counts its best slice of 25 µs: neighbours do not show
SAMPLES = 12


def read_rate(cache_bytes: int | None) -> float:
    """Bytes a second that all of torch's threads read from memory, the best of a few runs."""
    size = max(READ_BYTES, 4 * (cache_bytes or 0))
    data = torch.empty(size, dtype=torch.uint8)
    if core.why_no_core() is not None:
        data.zero_()
        words = data.view(torch.float32)
        return _best(lambda: words.sum(), size)
    lib, threads = core.load(), torch.get_num_threads()
    lib.moestro_cpu_advise_huge(data.data_ptr(), size)  # as weights are kept
    data.zero_()
    return _best(lambda: lib.moestro_cpu_read(data.data_ptr(), size, threads), size)


def arithmetic_rates(isa: str) -> dict[str, float]:
    """Operations a second (a multiplication and an addition are two) of each arithmetic that an instruction set has."""
    rates = {}
    for arithmetic in core.ARITHMETICS:
        if rate := _spin_rate(isa, arithmetic):
            rates[arithmetic] = rate
    if isa == "amx":  # tiles multiply bf16; the rest is AVX-512's
        rates = arithmetic_rates("avx512") | rates
    return rates


def best_float_rate() -> tuple[float, str]:
    """(operations a second, dtype) of the fastest floating-point arithmetic of this machine, in any instruction set."""
    if core.why_no_core() is not None:
        square = torch.randn(1024, 1024)
        return _best(lambda: square @ square, 2 * 1024**3), "float32"
    found = {
        arithmetic: max(_spin_rate(isa, arithmetic) for isa in core.available_isas())
        for arithmetic in ("float32", "bf16")
    }
    best = max(found, key=lambda name: found[name])
    return found[best], {"bf16": "bfloat16"}.get(best, best)


@functools.cache
def fallback(dtype: torch.dtype) -> str | None:
    """Why torch's products of a dtype are no fair measure here: it has no kernels for them; None if it has.

    Told by a small product each in float32 and in the dtype, laid out as a linear layer's: with kernels for it, bf16 is
    as fast as float32 or faster; without, it is 3 to 100 times slower. In turns, the best of each, until it is told.
    """
    x, w = torch.randn(64, 512), torch.randn(512, 512)
    pairs = [(x, w), (x.to(dtype), w.to(dtype))]
    best = [0.0, 0.0]
    for _ in range(2 * SAMPLES):
        for i, (left, right) in enumerate(pairs):
            best[i] = max(
                best[i], _best(functools.partial(torch.matmul, left, right.T), 2 * 64 * 512 * 512, 1)
            )
        if best[1] > 0.5 * best[0] > 0:
            return None
    name = str(dtype).removeprefix("torch.")
    return f"torch has no {name} kernels for this processor ({best[1] / 1e9:.1f} GFLOP/s, float32 {best[0] / 1e9:.1f})"


def _spin_rate(isa: str, arithmetic: str) -> float:
    """0 if the instruction set lacks the arithmetic, or this machine the instruction set."""
    args = core.ISAS.index(isa), core.ARITHMETICS.index(arithmetic)
    return float(core.load().moestro_cpu_rate(*args, SPIN_S, torch.get_num_threads()))


def _best(call: Callable[[], object], amount: int, samples: int = SAMPLES) -> float:
    """`amount` per second, the best of a few runs after one more."""
    seconds = []
    for _ in range(1 + samples):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return amount / min(seconds[1:])

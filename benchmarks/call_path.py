"""What a warm eager call costs on the host, beside a trivial torch operation and a new tensor.

    python benchmarks/call_path.py [--backend cpu] [--threads 1] [--json benchmarks/results/cpu_call_path.json]

A layer so small that its products cost little (E=4, K=2, H=64, I=32, NVFP4). Times are the smallest mean of several
rounds, in which all calls take their turns. To compare two builds, alternate: run each with its own PYTHONPATH, several
times.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moestro

E, K, H, I = 4, 2, 64, 32  # noqa: E741


def microseconds(
    calls: dict[str, Callable[[], Any]], number: int = 100, rounds: int = 200
) -> dict[str, float]:
    """Of one call each: the smallest mean of several rounds, each shorter than a turn on a core."""
    for call in calls.values():
        for _ in range(200):
            call()
    means = [
        {name: timeit.timeit(call, number=number) for name, call in calls.items()} for _ in range(rounds)
    ]
    return {name: min(mean[name] for mean in means) / number * 1e6 for name in calls}


def measure(backend: str, num_tokens: int) -> dict[str, float]:
    """Microseconds by what was called."""
    torch.manual_seed(0)
    dense = torch.randn(E, 2 * I, H).bfloat16() / 8, torch.randn(E, H, I).bfloat16() / 6
    w = moestro.ExpertWeights.from_dense(*dense, format="nvfp4")
    layer = moestro.FusedMoE(w, K, 64, backend=backend, tuner=moestro.AutoTuner(store=None))
    x = torch.randn(num_tokens, H).bfloat16()
    ids, weights = torch.randint(0, E, (num_tokens, K), dtype=torch.int32), torch.rand(num_tokens, K)
    a, out = torch.randn(8), torch.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {
        "a + a": lambda: a + a,
        "torch.empty": lambda: torch.empty((num_tokens, H), dtype=torch.bfloat16),
        "layer(x, ids, weights)": lambda: layer(x, ids, weights),
        "layer(x, ids, weights, out=out)": lambda: layer(x, ids, weights, out=out),
        "fused_moe(x, ids, weights, w)": lambda: moestro.fused_moe(x, ids, weights, w, backend=backend),
    }
    return microseconds(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for num_tokens in (1, 8):
            results[f"N={num_tokens}"] = measure(arguments.backend, num_tokens)
    for size, times in results.items():
        for name, us in times.items():
            print(f"{size:<6}{name:<36}{us:>9.2f} µs  {us / times['a + a']:>6.1f} x")
    if arguments.json is not None:
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "backend": arguments.backend,
            "threads": arguments.threads,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({**facts, "results": results}, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()

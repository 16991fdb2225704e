"""Verify steps of speculative decoding on the CPU: is the time that of the bytes of the experts that a step unites?

    python benchmarks/cpu_verify.py --isas avx512,avx2 --json benchmarks/results/cpu_verify.json

N tokens of one sequence share experts (routing.Correlated). Each step's time is set against the bytes of the experts that
its tokens name together, at the rate (bytes a second) which the same layer reaches with 16 such tokens. Weights are cold:
steps draw other experts, and a buffer of four times the last-level cache is written before each. Layers are shares of
DeepSeek-V3 (fewer experts, for memory) and Mixtral-8x7B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cpu_invariance import report, run
from cpu_machine import EVICTED, force, random_weights

from moestro.kernels.cpu import CpuRunner
from moestro.kernels.problem import MoeProblem
from moestro.routing import Correlated

LAYERS = {  # E, K, H, I
    "deepseek-v3 nvfp4, 64 experts": ("nvfp4", 64, 8, 7168, 2048),
    "deepseek-v3 bf16, 24 experts": ("bf16", 24, 8, 7168, 2048),
    "mixtral-8x7b nvfp4": ("nvfp4", 8, 2, 4096, 14336),
    "mixtral-8x7b bf16": ("bf16", 8, 2, 4096, 14336),
}
BASE = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isas", type=lambda text: text.split(","), default=["avx512", "avx2"])
    parser.add_argument("--layers", default="", help="only those whose name contains this")
    parser.add_argument(
        "--overlaps", type=lambda text: [float(o) for o in text.split(",")], default=[0.5, 0.8]
    )
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.what = "verify steps, time against the union's bytes at the rate of 16 tokens"
    torch.manual_seed(0)
    rows = [row for name in LAYERS if args.layers in name for row in layer(name, args)]
    if args.json:
        args.json.write_text(json.dumps(report(args, rows), indent=1) + "\n")


def layer(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    fmt, experts, top_k, hidden, inter = LAYERS[name]
    weights = random_weights(experts, hidden, inter, fmt)
    problem = MoeProblem.of(weights, top_k=top_k)
    runners = {}
    for isa in args.isas:
        force(isa)
        runners[isa] = CpuRunner(problem, weights)
    rows = []
    for overlap in args.overlaps:
        rates = steps(runners, problem, overlap, BASE, args.rounds)
        for tokens in args.tokens:
            for isa, (rate, ms, united) in steps(runners, problem, overlap, tokens, args.rounds).items():
                of_base = rates[isa][0] / rate
                row = {"layer": name, "isa": isa, "overlap": overlap, "tokens": tokens, "experts": united}
                row |= {
                    "median_ms": ms,
                    "gb_per_s": rate / 1e9,
                    "gb_per_s_at_16": rates[isa][0] / 1e9,
                    "time_of_expected": of_base,
                }
                rows.append(row)
                print(f"{name} {isa} overlap {overlap} N={tokens}: {united:.1f} experts {ms:.2f} ms {rate / 1e9:.1f} GB/s, "
                      f"{of_base:.2f} of the time at the rate of {BASE}", flush=True)  # fmt: skip
    return rows


def steps(
    runners: dict[str, CpuRunner], problem: MoeProblem, overlap: float, tokens: int, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Of each runner: median bytes a second of the united experts, median ms, mean experts."""
    found: dict[str, list[tuple[float, float]]] = {isa: [] for isa in runners}
    united, names = [], list(runners)
    for i in range(rounds + 1):  # the first warms up
        ids = Correlated(overlap).sample(tokens, problem.num_experts, problem.top_k, seed=1000 * tokens + i)
        x = torch.randn(tokens, problem.hidden_size).bfloat16()
        scores = torch.full(ids.shape, 1 / problem.top_k)
        united.append(ids.unique().numel())
        for isa in names[i % len(names) :] + names[: i % len(names)]:
            used = sum(p.nbytes for p in runners[isa]._weights) / problem.num_experts * united[-1]
            EVICTED.add_(1)
            start = time.perf_counter()
            run(runners[isa], [x, ids, scores])
            seconds = time.perf_counter() - start
            found[isa].append((used / seconds, seconds * 1e3))
    return {
        isa: (
            statistics.median(rate for rate, _ in taken[1:]),
            statistics.median(ms for _, ms in taken[1:]),
            statistics.mean(united[1:]),
        )
        for isa, taken in found.items()
    }


if __name__ == "__main__":
    main()

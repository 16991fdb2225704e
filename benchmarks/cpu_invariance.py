"""batch_invariant=True on the CPU: are a token's bits the same in every batch, and what does it cost?

    python benchmarks/cpu_invariance.py equal --batches 500 --json benchmarks/results/cpu_invariance_equal.json
    python benchmarks/cpu_invariance.py cost --isas avx512,avx2 --json benchmarks/results/cpu_invariance_cost.json

equal: a pool of tokens, half of which prefer one expert, is run token by token; then random batches of them (size, order,
repeats, chunks of one call after the other, tactic, threads) must give the same bits, in every instruction set of this
machine, every weight format and input format. cost: one Qwen3-30B-A3B layer with and without, alternating, cold weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cpu_machine import EVICTED, draw, force, random_weights

import moestro
from moestro import machine
from moestro.bench.models import find
from moestro.kernels.cpu import CpuRunner, CpuTactic, core
from moestro.kernels.problem import MoeProblem

EXPERTS, TOP_K, HIDDEN, INTER, POOL = 6, 3, 544, 160, 64
KINDS = [
    *(("nvfp4", None, torch.bfloat16), ("mxfp4", None, torch.bfloat16), ("bf16", None, torch.bfloat16)),
    *(("fp8_block", None, torch.bfloat16), ("nvfp4", "int8", torch.bfloat16), ("nvfp4", None, torch.float32)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("equal", "cost"))
    parser.add_argument("--isas", type=lambda text: text.split(","), default=list(core.available_isas()))
    parser.add_argument("--batches", type=int, default=500, help="equal: of each instruction set")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["nvfp4", "bf16"])
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [equal(isa, args.batches) for isa in args.isas] if args.what == "equal" else cost(args)
    if args.json:
        args.json.write_text(json.dumps(report(args, rows), indent=1) + "\n")
    sys.exit(any(row.get("different", 0) for row in rows))


def equal(isa: str, batches: int) -> dict[str, Any]:
    """How many of `batches` random batches had a row with other bits than the token alone."""
    force(isa)
    rng, different, rows = random.Random(0), 0, 0
    for i, (fmt, input_format, dtype) in enumerate(KINDS):
        weights = random_weights(EXPERTS, HIDDEN, INTER, fmt)
        problem = MoeProblem.of(
            weights, top_k=TOP_K, dtype=dtype, input_format=input_format, batch_invariant=True
        )
        runner = CpuRunner(problem, weights)
        pool = skewed_pool(dtype)
        alone = torch.cat([run(runner, [t[n : n + 1] for t in pool]) for n in range(POOL)])
        for _ in range((batches + i) // len(KINDS)):
            order = torch.tensor(rng.choices(range(POOL), k=rng.randint(1, 96)))
            found = in_chunks(runner, [t[order].contiguous() for t in pool], rng)
            different += not torch.equal(alone[order], found)
            rows += len(order)
    print(f"{isa}: {different} of {batches} batches differ ({rows} rows)", flush=True)
    return {"isa": isa, "batches": batches, "rows": rows, "different": different}


def skewed_pool(dtype: torch.dtype) -> list[torch.Tensor]:
    x, ids, scores = draw(POOL, EXPERTS, TOP_K, HIDDEN)
    ids[: POOL // 2] = torch.tensor([0, 1, 2], dtype=ids.dtype)
    return [x.to(dtype), ids, scores]


def in_chunks(runner: CpuRunner, call: list[torch.Tensor], rng: random.Random) -> torch.Tensor:
    tactic = rng.choice(
        (-1, CpuTactic(rng.randint(1, 64), rng.randint(1, 5), rng.randint(1, 40), rng.randint(0, 60)))
    )
    before, parts, at = torch.get_num_threads(), [], 0
    torch.set_num_threads(rng.choice((1, before)))
    while at < len(call[0]):
        to = at + rng.randint(1, len(call[0]))
        parts.append(run(runner, [t[at:to] for t in call], tactic))
        at = to
    torch.set_num_threads(before)
    return torch.cat(parts)


def run(runner: CpuRunner, call: list[torch.Tensor], tactic: Any = -1) -> torch.Tensor:
    return runner.forward([*call, torch.empty_like(call[0])], tactic)


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    shape = find("qwen3-30b-a3b")
    runners: dict[tuple[str, str, bool], CpuRunner] = {}
    for fmt in args.formats:
        weights = random_weights(shape.num_experts, shape.hidden_size, shape.intermediate_size, fmt)
        for isa in args.isas:
            force(isa)
            for invariant in (False, True):
                problem = MoeProblem.of(weights, top_k=shape.top_k, batch_invariant=invariant)
                runners[isa, fmt, invariant] = CpuRunner(problem, weights)
    rows = []
    for tokens in args.tokens or [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]:
        samples = alternate(runners, shape, tokens, args.rounds if tokens < 256 else max(3, args.rounds // 3))
        for isa, fmt, invariant in runners:
            if invariant:
                plain, taken = samples[isa, fmt, False], samples[isa, fmt, True]
                ratio = statistics.median(b / a for a, b in zip(plain, taken, strict=True))
                times = {
                    "default_ms": statistics.median(plain) * 1e3,
                    "invariant_ms": statistics.median(taken) * 1e3,
                }
                rows.append({"isa": isa, "format": fmt, "tokens": tokens, **times, "ratio": ratio})
                print(
                    f"N={tokens:5d} {isa:8s} {fmt:6s}",
                    *(f"{k} {v:.3f}" for k, v in [*times.items(), ("ratio", ratio)]),
                    flush=True,
                )
    return rows


def alternate(runners: dict[Any, CpuRunner], shape: Any, tokens: int, rounds: int) -> dict[Any, list[float]]:
    samples: dict[Any, list[float]] = {key: [] for key in runners}
    names = list(runners)
    for i in range(rounds + 1):  # the first warms up
        call = list(draw(tokens, shape.num_experts, shape.top_k, shape.hidden_size))
        for key in names[i % len(names) :] + names[: i % len(names)]:
            EVICTED.add_(1)
            start = time.perf_counter()
            run(runners[key], call)
            samples[key].append(time.perf_counter() - start)
    return {key: taken[1:] for key, taken in samples.items()}


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": f"batch invariance on the CPU: {args.what}",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": dataclasses.asdict(machine.cpu()),
        "threads": torch.get_num_threads(),
        "load_average_after": os.getloadavg(),
        "torch": torch.__version__,
        "moestro": getattr(moestro, "__version__", None),
        "rows": rows,
    }


if __name__ == "__main__":
    main()

"""Whole layers of few tokens on a CUDA device: two launches of products against one, under a dirty and a clean L2.

    PYTHONPATH=src python3 benchmarks/gpu_few_tokens.py qwen3 --json few.json
    nvcc -O3 -gencode=arch=compute_90a,code=sm_90a -o reads benchmarks/gpu_reads.cu && ./reads

Protocol as in gpu_helpers.py: graph replay between two events, variants alternate, medians, torch._grouped_mm
beside. Before each replay 256 MiB are written ("dirty": lines that must leave L2 while the layer reads), or
read ("clean": as when weights rotate). gpu_reads.cu says what reads alone take under both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from gpu_helpers import (
    MODELS,
    Clock,
    bytes_of,
    compile_all,
    error,
    grouped_mm,
    inputs_of,
    make,
    short,
    truth_of,
)

from moestro.kernels.triton import Tactic, Tile
from moestro.kernels.triton import choose as table
from moestro.kernels.triton.paths import chain, fused

T, S, S6, S44 = Tile(32, 4, 2, 4), Tile(64, 2, 4, 4), Tile(64, 2, 4, 6), Tile(64, 4, 4, 4)
M, M4, M5, W = Tile(128, 2, 4, 3), Tile(128, 2, 4, 4), Tile(128, 2, 4, 5), Tile(128, 2, 8, 3)


def direct(tile: Tile, split: int = 1, ahead: int = 0) -> Tactic:
    return chain.tactic(8, tile, "direct", split_k=split, prefetch_kib=ahead)


def sorted_(tokens: int, tile: Tile, split: int = 1, narrow: str = "") -> Tactic:
    return chain.tactic(tokens, tile, split_k=split, narrow=narrow)


def two(tokens: int, tile: Tile, route: str = "direct", split: int = 1, narrow: str = "") -> Tactic:
    return fused.tactic(tokens, tile, tile, route, split_k=split, narrow=narrow)


def variants(model: str, n: int) -> list[Tactic]:
    """What is compared, the two launches that were best first."""
    if model == "mixtral":
        return {
            1: [two(8, S, split=4), two(8, S6, split=8), direct(T, 4), direct(T, 4, 16), direct(T, 7, 16)],
            4: [two(8, S, split=4), direct(S, 4), direct(S, 8), direct(S6, 4), direct(M5, 4)],
            16: [two(8, T, "sorted"), sorted_(8, T), sorted_(8, T, 2), sorted_(8, S, 4), sorted_(16, M, 4)],
            64: [two(32, S, "sorted"), two(32, M, "sorted", 4), *(sorted_(32, M, s) for s in (2, 4, 7))],
        }[n]
    few = {
        1: [*(two(8, t) for t in (T, S, M)), direct(T), direct(T, ahead=16), direct(S), direct(S6)],
        4: [two(8, M), two(8, S, "sorted"), *(direct(t) for t in (S, S6, S44, M5)), direct(S6, ahead=16),
            sorted_(8, S), sorted_(8, S6)],
        16: [two(8, S, "sorted"), two(8, T, "sorted"), *(sorted_(8, t) for t in (S, M, M4, M5)), sorted_(16, M)],
    }  # fmt: skip
    if n < 64:
        return few[n]
    if model == "qwen3":
        return [two(8, M, "sorted"), *(sorted_(8, t) for t in (S6, M, M4, M5)), sorted_(16, M)]
    return [two(64, M, "sorted", narrow="quarters"), sorted_(32, M), sorted_(32, M4), sorted_(32, M, 2), sorted_(32, W),
            sorted_(64, M, narrow="quarters")]  # fmt: skip


class CleanClock(Clock):
    """What is in L2 before a replay was only read."""

    def once(self, replay: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.view(torch.int32).max()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3  # µs


def measure(model: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    runner, plain = make(*MODELS[model], "nvfp4")
    matrices = (plain.gate_up, plain.down)
    dense = [
        torch.stack([q.expert(e).dequantize(torch.bfloat16) for e in range(len(q.packed))]) for q in matrices
    ]
    clocks, rows = {"dirty": Clock(), "clean": CleanClock()}, []
    for n in tokens:
        inputs = inputs_of(runner, n)
        wanted = [
            table.default(runner.problem, n),
            *(table.fitted(runner.problem, t) for t in variants(model, n)),
        ]
        chosen = [t for t in dict.fromkeys(wanted) if table.why_not(runner.problem, t, n) is None]
        compile_all(runner, [(inputs, t) for t in chosen])
        truth, runs, keep, errors = truth_of(runner, plain, inputs), {}, [], {}
        for tactic in chosen:
            name = f"{tactic.path} {short(tactic)}"
            errors[name] = (error(runner, plain, inputs, tactic, truth), tactic)
            graph = clocks["dirty"].graph(partial(runner.forward, inputs, tactic))
            keep.append((graph, runner._workspace))
            runs[name] = graph.replay
        graph = clocks["dirty"].graph(partial(grouped_mm, inputs, *dense))
        runs["grouped_mm"] = graph.replay
        times = {kind: clock.medians(runs, rounds) for kind, clock in clocks.items()}
        moved, hit = sum(bytes_of(runner, inputs)), len(torch.unique(inputs[1]))
        print(f"{model} N={n}: {hit} experts hit, {moved / 1e6:.0f} MB")
        for name, us in sorted(times["dirty"].items(), key=lambda kv: kv[1]):
            e, tactic = errors.get(name, (None, None))
            rows.append({"model": model, "format": "nvfp4", "tokens": n, "what": name, "experts_hit": hit,
                         "us": round(us, 2), "clean_us": round(times["clean"][name], 2), "error": e,
                         "tb_per_s": round(moved / us / 1e6, 3),
                         **({"tactic": asdict(tactic)} if tactic else {})})  # fmt: skip
            default = "*" if tactic == chosen[0] else " "
            print(
                f" {default}{us:7.1f} us (clean {times['clean'][name]:7.1f}) {moved / us / 1e6:.2f} TB/s {name}"
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("qwen3", "mixtral", "deepseek"))
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = measure(args.model, [int(t) for t in args.tokens.split(",")], args.rounds)
    if args.json:
        with open(args.json, "w") as f:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "argv": sys.argv[1:]}
            json.dump({**about, "rows": rows}, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time the Triton kernels on a CUDA device: every variant in one process, no tuner in between.

    python benchmarks/gpu_kernels.py stages qwen3 --tokens 1,16   each kernel of each variant alone
    python benchmarks/gpu_kernels.py layer qwen3 --tokens 1,16    whole layers, with torch._grouped_mm beside

Protocol: gpu_helpers.py's, median of `--rounds`. Results go to `--json`; numbers are checked by gpu_formats.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from gpu_helpers import (
    DEV,
    MODELS,
    WIDE,
    Clock,
    bytes_of,
    compile_all,
    error,
    flops_of,
    grouped_mm,
    inputs_of,
    make,
    short,
    truth_of,
)

from moestro.kernels.triton import Tactic, Tile
from moestro.kernels.triton import choose as table
from moestro.kernels.triton.paths import dequantized, fused


def space(n: int, per_expert: float) -> list[Tactic]:
    """Variants worth a look at n tokens."""

    def same(bn: int, tile: tuple[int, int, int, int], group: int = 8, **kw: Any) -> Tactic:
        found = fused.tactic(bn, Tile(*tile), Tile(*tile), "direct" if n <= 4 else "sorted", **kw)
        return replace(found, raster_group=group)

    out = []
    if per_expert <= 5:
        for tile in ((64, 2, 4, 4), (64, 2, 4, 6), (32, 4, 2, 4), (64, 4, 4, 3), (128, 2, 4, 3)):
            out += [same(8, tile, split_k=s) for s in (1, 2, 4)]
        out += [same(16, tile) for tile in ((64, 2, 4, 4), (128, 2, 4, 3))]
    elif per_expert <= 24:
        for tile in ((64, 2, 4, 4), (128, 2, 4, 3), (128, 2, 4, 4), (128, 2, 8, 3), (64, 4, 4, 3)):
            out += [same(16, tile), same(32, tile), same(32, tile, split_k=2), same(32, tile, group=16)]
    else:
        for tile in ((256, 1, 8, 4), (256, 2, 8, 3), (256, 1, 16, 4), (256, 2, 16, 3), (128, 1, 8, 4),
                     (128, 2, 8, 3), (128, 1, 4, 4), (128, 2, 4, 3)):  # fmt: skip
            for bn in (64, 128, 256):
                if not per_expert / 3 <= bn <= per_expert * 3 or bn * tile[0] > 256 * tile[2] * 16:
                    continue
                out += (
                    [same(bn, tile), same(bn, tile, narrow="quarters")]
                    if bn >= per_expert
                    else [same(bn, tile)]
                )
    if per_expert >= 24:
        out += WIDE
    if per_expert >= 200:
        for tile, bn in (
            ((256, 1, 8, 4), 128),
            ((256, 1, 16, 4), 128),
            ((128, 1, 8, 4), 256),
            ((128, 1, 4, 4), 128),
        ):
            out += [same(bn, tile, group=g) for g in (8, 16)]
        for tile, group in (((256, 1, 8, 4), 8), ((256, 1, 8, 4), 16)):
            out.append(replace(dequantized.tactic(128, Tile(*tile)), raster_group=group))
    return list(dict.fromkeys(out))


def stages(model: str, fmt: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every kernel alone, for every variant."""
    runner, _ = make(*MODELS[model], fmt)
    clock, rows = Clock(), []
    for n in tokens:
        per_expert = n * runner.problem.top_k / min(runner.problem.num_experts, n * runner.problem.top_k)
        inputs = inputs_of(runner, n)
        variants = [
            t
            for t in map(partial(table.fitted, runner.problem), space(n, per_expert))
            if table.why_not(runner.problem, t, n) is None
        ]
        biggest = max(runner.workspace_bytes(n, t) for t in variants)
        runner.use_workspace(torch.empty(biggest, dtype=torch.uint8, device=DEV))
        began = time.time()
        failed = compile_all(runner, [(inputs, t) for t in variants])
        compiled = time.time() - began
        runs: dict[str, Callable[[], Any]] = {}
        keep: list[Any] = []
        for i, tactic in enumerate(variants):
            if i in failed:
                print("  failed", tactic, failed[i])
                continue
            own = torch.empty(runner.workspace_bytes(n, tactic), dtype=torch.uint8, device=DEV)
            runner.use_workspace(own)  # a kernel alone reads what others of its own tactic left
            keep.append(own)
            launches = runner.plan(inputs, tactic)
            try:
                for launch in launches:
                    launch.run()
                torch.cuda.synchronize()
                graph = clock.graph(partial(runner.forward, inputs, tactic))
                keep.append(graph)
                runs[f"{i}|9|layer"] = graph.replay
                for j, launch in enumerate(launches):
                    name = launch.kernel.__name__ + str(getattr(launch.meta.get("HOW"), "stage", ""))
                    graph = clock.graph(launch.run)
                    keep.append(graph)
                    runs[f"{i}|{j}|{name}"] = graph.replay
            except Exception as error:
                print("  failed", tactic, str(error)[:150])
        times = clock.medians(runs, rounds)
        nbytes, flops = bytes_of(runner, inputs), flops_of(runner, n)
        print(f"== {model} {fmt} N={n}: {len(variants)} variants, compiled in {compiled:.1f} s")
        best: dict[str, list[tuple[float, str]]] = {}
        for key, t in times.items():
            i, _, name = key.split("|")
            best.setdefault(name, []).append((t, short(variants[int(i)])))
            rows.append(
                {
                    "model": model,
                    "format": fmt,
                    "tokens": n,
                    "kernel": name,
                    "us": t,
                    "tactic": asdict(variants[int(i)]),
                }
            )
        for name, results in best.items():
            results.sort()
            s = slice(0, 2) if name == "layer" else slice(0, 1) if name.endswith("1") else slice(1, 2)
            extra = ""
            if "gemm" in name or name == "layer":
                rates = sum(nbytes[s]) / results[0][0] / 1e6, sum(flops[s]) / results[0][0] / 1e6
                extra = f"  {rates[0]:.2f} TB/s {rates[1]:.0f} TFLOP/s"
            print(
                f"  {name}: "
                + ", ".join(f"{t:.1f} {v}" for t, v in results[: 5 if "gemm" in name else 2])
                + extra
            )
        del keep, runs
    return rows


def layer(
    model: str, fmt: str, tokens: list[int], rounds: int, every: bool, baseline: bool
) -> list[dict[str, Any]]:
    """Whole layers: the default tactic, or every candidate; errors; torch._grouped_mm in the same run."""
    runner, plain = make(*MODELS[model], fmt)
    dense: list[torch.Tensor] = []
    if baseline:
        for q in (plain.gate_up, plain.down):
            dense.append(torch.stack([q.expert(e).dequantize(torch.bfloat16) for e in range(q.shape[0])]))
    clock, rows = Clock(), []
    for n in tokens:
        inputs = inputs_of(runner, n)
        default = table.default(runner.problem, n)
        per_expert = n * runner.problem.top_k / min(runner.problem.num_experts, n * runner.problem.top_k)
        others = table.candidates(runner.problem, n) + WIDE * (per_expert >= 24) if every else []
        others = [t for t in others if table.why_not(runner.problem, t, n) is None]
        chosen = list(dict.fromkeys([default, *others]))
        chosen = [
            t
            for t in chosen
            if t == default or min(per_expert / 6, 128) <= t.pairs1 <= max(16, per_expert * 4)
        ]
        runner.use_workspace(
            torch.empty(max(runner.workspace_bytes(n, t) for t in chosen), dtype=torch.uint8, device=DEV)
        )
        began = time.time()
        failed = compile_all(runner, [(inputs, t) for t in chosen])
        compiled = time.time() - began
        truth = truth_of(runner, plain, inputs) if n <= 1024 else None
        runs: dict[str, Callable[[], Any]] = {}
        by_name, errors, keep = {}, {}, []
        for i, t in enumerate(chosen):
            if i in failed:
                print("failed", t, failed[i])
                continue
            name = ("*" if t == default else "") + short(t)
            by_name[name] = t
            if truth is not None:
                errors[name] = error(runner, plain, inputs, t, truth)
            graph = clock.graph(partial(runner.forward, inputs, t))
            keep.append((graph, runner._workspace))
            runs[name] = graph.replay
        if dense:
            runs["grouped_mm eager"] = partial(grouped_mm, inputs, *dense)
            graph = clock.graph(runs["grouped_mm eager"])
            keep.append((graph, None))
            runs["grouped_mm graph"] = graph.replay
        times = clock.medians(runs, rounds)
        nbytes, flops = sum(bytes_of(runner, inputs)), sum(flops_of(runner, n))
        print(f"{model} {fmt} N={n} compiled {len(chosen)} in {compiled:.1f} s")
        for place, (name, t) in enumerate(sorted(times.items(), key=lambda kv: kv[1])):
            row = {"model": model, "format": fmt, "tokens": n, "what": name, "us": round(t, 2),
                   "error": errors.get(name), "tb_per_s": round(nbytes / t / 1e6, 3),
                   "tflops": round(flops / t / 1e6, 1)}  # fmt: skip
            if name in by_name:
                row["tactic"] = asdict(by_name[name])
            rows.append(row)
            if place < 3 or "*" in name or "mm" in name:
                print(f"  {t:9.1f} us {nbytes / t / 1e6:5.2f} TB/s {flops / t / 1e6:6.1f} TFLOP/s"
                      f" err {errors.get(name, float('nan')):.1e} {name}")  # fmt: skip
        if errors:
            print("  worst error", max(errors.values()))
        del keep, runs
    return rows


def ceilings() -> dict[str, float]:
    clock = Clock()
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEV)
    b = torch.empty_like(a)
    copy = statistics.median(clock.once(lambda: b.copy_(a)) for _ in range(9))
    m = torch.randn(8192, 8192, device=DEV).bfloat16()
    mm = statistics.median(clock.once(lambda: m @ m) for _ in range(9))
    one = torch.zeros(1, device=DEV)
    graph = clock.graph(lambda: one.add_(1))
    empty = statistics.median(clock.once(graph.replay) for _ in range(21))
    found = {
        "copy_tb_s": 2 * a.numel() / copy / 1e6,
        "bf16_tflops": 2 * 8192**3 / mm / 1e6,
        "trivial_graph_us": empty,
    }
    print(found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("stages", "layer", "ceilings"))
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="every candidate, not only the default tactic")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    if args.command == "ceilings":
        rows: Any = ceilings()
    elif args.command == "stages":
        rows = stages(args.model, args.format, tokens, args.rounds)
    else:
        rows = layer(args.model, args.format, tokens, args.rounds, args.all, args.baseline)
    if args.json:
        with open(args.json, "w") as f:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "argv": sys.argv[1:],
                     "models": MODELS}  # fmt: skip
            json.dump({**about, "rows": rows}, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

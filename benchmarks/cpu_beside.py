"""One layer of one instruction set beside peers held to the same: the machine that has no more, as far as it can be made.

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MOESTRO_CPU_ISA=avx2 \\
      python benchmarks/cpu_beside.py --ggml FOLDER --tokens 1,4,16,64,256,1024 --json out.json

Transformers' experts in bf16 and float32, llama.cpp's ggml (cpu_peers.py; the folder has a build for that instruction
set) in its own 4-bit types, and Moestro's formats take turns. Weights are four experts over and over, each with rows
of its own in memory; every round draws a routing, and a buffer of four times the last-level cache is written before
each sample, so that weights are cold. A peer beyond a second that is four times slower than another is left out after
its warm-up, with its time. The variables above reach torch's own kernels, oneDNN and MKL; they are recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_layer import peer
from cpu_machine import DRAWN, EVICTED, dense_weights, draw, random_weights
from cpu_peers import GgmlExperts, VllmExperts

import moestro
from moestro import machine
from moestro.bench.models import MoeShape, find
from moestro.kernels.cpu import core

Run = Callable[..., torch.Tensor]
SLOW_S, SLOW = 1.0, 4.0
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", core.ISA_VARIABLE)


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    shape = find(args.model)
    contenders = make_contenders(shape, args)
    rows = []
    with torch.inference_mode():
        for tokens in args.tokens:
            rows += measure(contenders, shape, tokens, args)
            show([row for row in rows if row["tokens"] == tokens])
    if args.json:
        args.json.write_text(json.dumps(report(args, rows), indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--formats", default="nvfp4,bf16,nvfp4+int8")
    parser.add_argument("--peers", default="eager,grouped_mm")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--ggml", type=Path, help="a folder with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--ggml-types", default="nvfp4,mxfp4,q4_k")
    parser.add_argument("--vllm", type=Path, help="a folder with an unpacked CPU wheel of vLLM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of each number of tokens, at most; 2 rounds at least"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_contenders(shape: MoeShape, args: argparse.Namespace) -> dict[str, Run]:
    few = dense_weights(DRAWN, shape.hidden_size, shape.intermediate_size)
    contenders: dict[str, Run] = {}
    for dtype in filter(None, args.dtypes.split(",") if args.peers else []):
        dense = [repeat(d.to(getattr(torch, dtype)), shape.num_experts) for d in few]
        for name in args.peers.split(","):
            contenders[f"transformers {name} {dtype}"] = peer(name, *dense)
        if args.vllm and dtype == "bfloat16":
            library = "_C_AVX2.abi3.so" if core.choose_isa() in ("avx2", "avx_vnni") else "_C.abi3.so"
            contenders["vllm bf16"] = VllmExperts(args.vllm, *dense, library)
    if args.ggml:
        for kind in args.ggml_types.split(","):
            contenders[f"ggml {kind}"] = GgmlExperts.quantized(args.ggml, kind, *few, shape.num_experts)
    for fmt in args.formats.split(","):
        name, _, input_format = fmt.partition("+")
        weights = random_weights(shape.num_experts, shape.hidden_size, shape.intermediate_size, name)
        contenders[f"moestro {fmt}"] = moestro.FusedMoE(
            weights, top_k=shape.top_k, backend="cpu", input_format=input_format or None
        )
    return contenders


def repeat(dense: torch.Tensor, experts: int) -> torch.Tensor:
    return dense.repeat(experts // len(dense), 1, 1)


def inputs_of(name: str, run: Run, call: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x, ids, weights = call
    if name.startswith("transformers"):  # as its routers hand them on
        dtype = getattr(torch, name.split()[-1])
        return x.to(dtype), ids.long(), weights.to(dtype)
    if isinstance(run, GgmlExperts):
        run.prepare(*ids.shape)
        return x.float(), ids, weights
    return call


def measure(
    contenders: dict[str, Run], shape: MoeShape, tokens: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, end = list(contenders), time.monotonic() + args.seconds
    for i in range(args.rounds + 1):  # the first warms up
        call = draw(tokens, shape.num_experts, shape.top_k, shape.hidden_size)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            inputs = inputs_of(name, contenders[name], call)
            EVICTED.add_(1)
            start = time.perf_counter()
            contenders[name](*inputs)
            samples[name].append(time.perf_counter() - start)
        if i == 0:
            best = min(taken[0] for name, taken in samples.items() if not name.startswith("moestro"))
            names = [n for n in names if samples[n][0] < max(SLOW_S, SLOW * best)]
        if i >= 2 and time.monotonic() > end:
            break
    return [row(name, tokens, taken) for name, taken in samples.items()]


def row(name: str, tokens: int, taken: list[float]) -> dict[str, Any]:
    kept = taken[1:] or taken
    times = {"median_ms": statistics.median(kept) * 1e3, "min_ms": min(kept) * 1e3, "max_ms": max(kept) * 1e3}
    return {"contender": name, "tokens": tokens, **times, "samples": len(taken) - 1}


def show(rows: list[dict[str, Any]]) -> None:
    groups = {name: fastest(rows, name) for name in ("transformers", "ggml", "vllm")}
    for r in rows:
        ratios = [
            f"{best['median_ms'] / r['median_ms']:5.2f}x {best['contender']}"
            for best in groups.values()
            if best is not None and r["contender"].startswith("moestro")
        ]
        left_out = "" if r["samples"] else "  (left out after this one)"
        print(
            f"N={r['tokens']:5d} {r['contender']:32s} {r['median_ms']:10.3f} ms [{r['min_ms']:.3f} .. "
            f"{r['max_ms']:.3f}]  {'  '.join(ratios)}{left_out}",
            flush=True,
        )


def fastest(rows: list[dict[str, Any]], prefix: str) -> dict[str, Any] | None:
    group = [row for row in rows if row["contender"].startswith(prefix)]
    return min(group, key=lambda row: float(row["median_ms"])) if group else None


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": f"one {args.model} layer on the CPU beside peers, cold weights, alternating, medians",
        "command": " ".join(
            [*(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ), "python", *sys.argv]
        ),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": dataclasses.asdict(machine.cpu()),
        "threads": torch.get_num_threads(),
        "isa": core.choose_isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_after": os.getloadavg(),
        "torch": torch.__version__,
        "moestro": getattr(moestro, "__version__", None),
        "rows": rows,
    }


if __name__ == "__main__":
    main()

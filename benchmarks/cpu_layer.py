"""One MoE layer on the CPU: Moestro's cpu backend against Transformers' experts, alternating, weights cold.

    python benchmarks/cpu_layer.py --model qwen3-30b-a3b --tokens 1,8,64 --json benchmarks/results/cpu_x.json

Every round draws a routing (top-k of softmax of normal logits); every contender runs it, in rotated order.
Before each sample a buffer of four times the last-level cache is written, so that weights come from memory.
The time is that of one call on torch's threads; the router is outside. Moestro runs untuned: its default
tactic through the public layer. `--error` also gives the relative error norm against the float32 reference.
`--ggml` and `--vllm` add llama.cpp's and vLLM's layers from libraries on this machine (see cpu_peers.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from cpu_peers import GgmlExperts, VllmExperts
from transformers.integrations import moe as transformers_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moestro
from moestro.formats import NVFP4
from moestro.kernels.cpu import core

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SIZES = {  # E, K, H, I
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3-16-experts": (16, 8, 7168, 2048),
}
EVICT_BYTES = 128 << 20
BATCHED_PAIRS = 16  # batched_mm copies both matrices of every pair: more would take tens of GB


def main() -> None:
    args = parse()
    sizes = SIZES[args.model]
    torch.manual_seed(0)
    contenders, weights = make_contenders(sizes, args)
    rows = []
    with torch.inference_mode():
        for num_tokens in map(int, args.tokens.split(",")):
            rows += measure(contenders, sizes, num_tokens, args.rounds)
            if args.error:
                add_errors(rows, contenders, weights, sizes, num_tokens)
            show(rows, num_tokens)
    if args.json:
        args.json.write_text(json.dumps(report(args, sizes, rows), indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="1,8,64,512,1024")
    parser.add_argument("--formats", default="nvfp4,bf16")
    parser.add_argument("--peers", default="eager,grouped_mm,batched_mm")
    parser.add_argument("--rounds", type=int, default=11, help="a third of them from 256 tokens on")
    parser.add_argument("--error", action="store_true")
    parser.add_argument("--ggml", type=Path, help="a folder with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--vllm", type=Path, help="a folder with an unpacked CPU wheel of vLLM")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_contenders(
    sizes: tuple[int, int, int, int], args: argparse.Namespace
) -> tuple[dict[str, Run], dict[str, moestro.ExpertWeights]]:
    experts, top_k, hidden, inter = sizes
    gate_up = normal(experts, 2 * inter, hidden)
    down = normal(experts, hidden, inter)
    peers = filter(None, args.peers.split(","))
    contenders: dict[str, Run] = {f"transformers {p}": peer(p, gate_up, down) for p in peers}
    if args.vllm:
        contenders["vllm bf16"] = VllmExperts(args.vllm, gate_up, down)
    weights = {}
    for fmt in args.formats.split(","):
        quantized = [moestro.formats.get(fmt).quantize(dense) for dense in (gate_up, down)]
        if fmt == "nvfp4":  # one global scale for all experts, as ggml's tensors have none of their own
            quantized = [
                NVFP4.quantize(d, d.abs().amax().float().expand(experts) / 2688) for d in (gate_up, down)
            ]
            if args.ggml:
                contenders["ggml nvfp4"] = GgmlExperts(args.ggml, *quantized)
        layer = moestro.FusedMoE(moestro.ExpertWeights(*quantized), top_k=top_k, backend="cpu")
        contenders[f"moestro {fmt}"] = layer
        weights[f"moestro {fmt}"] = layer.weights
    return contenders, weights


def normal(*shape: int) -> torch.Tensor:
    """bf16 normal values of standard deviation 1/√columns, an expert at a time."""
    out = torch.empty(shape, dtype=torch.bfloat16)
    for matrix in out:
        matrix.normal_(std=shape[-1] ** -0.5)
    return out


def peer(implementation: str, gate_up: torch.Tensor, down: torch.Tensor) -> Run:
    """Transformers' experts module on our tensors; it takes int64 ids and weights in x's dtype."""
    experts, hidden, inter = down.shape
    config = SimpleNamespace(
        num_experts=experts,
        hidden_size=hidden,
        moe_intermediate_size=inter,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    if implementation != "eager":
        assert implementation in transformers_moe.ALL_EXPERTS_FUNCTIONS
    return module


def draw(sizes: tuple[int, int, int, int], num_tokens: int) -> tuple[torch.Tensor, ...]:
    """x bf16 [N, H], ids int32 [N, K], renormalised weights float32 [N, K]."""
    experts, top_k, hidden, _ = sizes
    weights, ids = torch.randn(num_tokens, experts).softmax(-1).topk(top_k)
    x = torch.randn(num_tokens, hidden).bfloat16()
    return x, ids.int().contiguous(), (weights / weights.sum(-1, keepdim=True)).contiguous()


def measure(
    contenders: dict[str, Run], sizes: tuple[int, int, int, int], num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    top_k = sizes[1]
    names = [n for n in contenders if "batched" not in n or num_tokens * top_k <= BATCHED_PAIRS]
    rounds = rounds if num_tokens < 256 else max(3, rounds // 3)
    evict = torch.zeros(EVICT_BYTES, dtype=torch.uint8)
    samples: dict[str, list[float]] = {name: [] for name in names}
    hit = []
    for i in range(rounds + 1):  # the first round warms up
        call = draw(sizes, num_tokens)
        hit.append(call[1].unique().numel())
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run, inputs = contenders[name], call
            if name.startswith("transformers"):  # as its routers hand them on
                inputs = (call[0], call[1].long(), call[2].to(call[0].dtype))
            if isinstance(run, GgmlExperts):
                inputs = (call[0].float(), *call[1:])
                run.prepare(*call[1].shape)
            evict.add_(1)
            start = time.perf_counter()
            run(*inputs)
            samples[name].append(time.perf_counter() - start)
    return [row(name, num_tokens, sizes, samples[name][1:], statistics.mean(hit[1:])) for name in names]


def row(
    name: str, num_tokens: int, sizes: tuple[int, int, int, int], times: list[float], hit: float
) -> dict[str, Any]:
    _, top_k, hidden, inter = sizes
    median = statistics.median(times)
    bytes_per_weight = 0.5625 if "nvfp4" in name else 2
    return {
        "contender": name,
        "tokens": num_tokens,
        "median_ms": median * 1e3,
        "min_ms": min(times) * 1e3,
        "max_ms": max(times) * 1e3,
        "samples": len(times),
        "experts_hit": hit,
        "gflops": 6 * num_tokens * top_k * hidden * inter / median / 1e9,
        "weight_gb_per_s": 3 * hit * hidden * inter * bytes_per_weight / median / 1e9,
    }


def add_errors(
    rows: list[dict[str, Any]],
    contenders: dict[str, Run],
    weights: dict[str, moestro.ExpertWeights],
    sizes: tuple[int, int, int, int],
    num_tokens: int,
) -> None:
    call = draw(sizes, min(num_tokens, 16))
    for row in rows:
        name = row["contender"]
        if row["tokens"] == num_tokens and not name.startswith("transformers"):
            run, of = contenders[name], weights.get(f"moestro {name.split()[-1]}")
            if of is None:
                continue
            expected = moestro.reference.fused_moe(*call, of)
            y = run(call[0].float() if isinstance(run, GgmlExperts) else call[0], *call[1:]).float()
            row["error"] = float((y - expected).norm() / expected.norm())


def show(rows: list[dict[str, Any]], num_tokens: int) -> None:
    now = [row for row in rows if row["tokens"] == num_tokens]
    best = {name: r["median_ms"] for r in now for name in [r["contender"]]}
    peers = {name: ms for name, ms in best.items() if not name.startswith("moestro")}
    for r in now:
        if "error" in r:
            print(f"N={num_tokens:5d} {r['contender']:24s} relative error {r['error']:.1e}")
    for r in now:
        ratios = "  ".join(f"{ms / r['median_ms']:5.2f}x {name.split()[-1]}" for name, ms in peers.items())
        ratios = ratios if r["contender"].startswith("moestro") else ""
        print(
            f"N={num_tokens:5d} {r['contender']:24s} {r['median_ms']:10.3f} ms [{r['min_ms']:.3f} .. "
            f"{r['max_ms']:.3f}] {r['gflops']:6.0f} GFLOP/s {r['weight_gb_per_s']:6.1f} GB/s  {ratios}",
            flush=True,
        )


def report(args: argparse.Namespace, sizes: tuple[int, ...], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "one MoE layer on the CPU, cold weights, alternating, medians",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": core.choose_isa(),
        "load_average_after": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moestro": moestro.__version__ if hasattr(moestro, "__version__") else None,
        "layer": dict(zip(("experts", "top_k", "hidden", "intermediate"), sizes, strict=True)),
        "rows": rows,
    }


def processor() -> str:
    """The processor as Linux names it, with family and model; the platform's word elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return (
        f"{facts.get('model name', '').strip()} (family{facts.get('cpu family')}, model{facts.get('model')})"
    )


if __name__ == "__main__":
    main()

"""Two or more GPUs of one host, checked and measured: what docs/distributed.md says of them.

    torchrun --nproc-per-node 2 benchmarks/gpu_ep.py --out DIR              # NCCL, about three minutes
    torchrun --nproc-per-node 2 benchmarks/gpu_ep.py --out DIR --device cpu --small

Sections, each written to DIR/<section>.json as soon as it is known: equality with the one-rank layer, of NVFP4 and, on
GPUs, of kernels in CUDA C++ (FP8 activations), also from a graph; a layer on each GPU of one process; ten
tunings by the group, whose decisions must be the same on all ranks; DeepSeek-V3 shapes, and which way the tuner
chooses for them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moestro
from moestro import ExpertWeights, FusedMoE, reference
from moestro.bench import ep as bench
from moestro.bench import results
from moestro.bench.models import find
from moestro.parallel import ExpertParallel, place, tuned
from moestro.parallel.tuned import AgreedWays, tune_ways
from moestro.routing import Uniform, parse
from moestro.tuning import AutoTuner, MeasurementPolicy

STARTED = time.monotonic()
E, K, H, I = 8, 3, 256, 128  # noqa: E741
REPLICAS = [[0, 1], [0], [1], [0, 1], [1], [0], [1], [0]]
QUICK = MeasurementPolicy(max_rounds=40, max_seconds=2.0)
Kind = tuple[str, str | None]  # formats of weights and of activations
KINDS: tuple[Kind, ...] = (("nvfp4", None), ("mxfp4", "fp8"), ("fp8_block", "fp8"))
PLACEMENTS = {"contiguous": None, "replicas": REPLICAS}


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def weights_of(device: str, experts: int = E, fmt: str = "nvfp4") -> ExpertWeights:
    g = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(experts, 2 * I, H, generator=g) * 0.1).bfloat16()
    down = (torch.randn(experts, H, I, generator=g) * 0.1).bfloat16()
    return ExpertWeights.from_dense(gate_up, down, fmt).to(device)


def call_of(rank: int, count: int, routing: str, device: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, H, generator=g).bfloat16()
    weights = torch.rand(count, K, generator=g)
    ids = torch.full((count, K), E - 1, dtype=torch.int32)
    if routing != "one expert":
        ids = parse(routing).sample(count, E, K, seed=7 + rank)
    return x.to(device), ids.contiguous().to(device), weights.to(device)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm().clamp(min=1e-6)) if expected.numel() else 0.0


def equality(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """Both ways, of each kind of weights and activations, against the float32 reference of the whole layer."""
    for kind in KINDS[:1] if device == "cpu" else KINDS:  # FP8 activations are a GPU's
        w = weights_of(device, fmt=kind[0])
        payloads = ("bf16", "fp8") if kind[1] is None else ("bf16",)
        for name, payload in product(PLACEMENTS, payloads):
            layer = FusedMoE(w, K, 512, input_format=kind[1])
            ep = ExpertParallel(layer, group, PLACEMENTS[name], payload=payload)
            for row in _equal(ep, w, kind, device):
                yield {"kind": kind, "placement": name, "payload": payload, **row}


def _equal(ep: ExpertParallel, w: ExpertWeights, kind: Kind, device: str) -> Iterator[dict[str, Any]]:
    rank = dist.get_rank()
    for count, routing in product(([16, 16], [7, 1], [0, 9]), ("uniform", "zipf:1.2", "one expert")):
        x, ids, weights = call_of(rank, count[rank], routing, device)
        expected = truth(x, ids, weights, w, kind)
        for way in ("gather", "dispatch"):
            mine = error(ep(x, ids, weights, way=way), expected)
            worst = max(ep.peers.link.exchange("error", mine))
            limit = 0.08 if ep.payload == "fp8" and way == "dispatch" else 0.01
            yield {
                "path": path_of(ep, count[rank]), "tokens": count, "routing": routing, "way": way,
                "transport": type(ep.ways[way]).__name__, "error": worst, "fine": worst < limit,
            }  # fmt: skip


def path_of(ep: ExpertParallel, tokens: int) -> str:
    """What the local layer runs of so many tokens before it is tuned."""
    runner = ep.layer.runners[0]
    if runner.backend != "triton":
        return str(runner.backend)
    from moestro.kernels.triton import choose

    return choose.default(runner.problem, max(tokens, 1)).path


def truth(x: Any, ids: Any, weights: Any, w: ExpertWeights, kind: Kind) -> torch.Tensor:
    how = {} if kind[1] is None else {"input_format": kind[1], "weight_rounding": "e4m3"}
    return reference.fused_moe(x, ids, weights, w, **how)


def captured(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """The same from a CUDA graph that was captured with other tokens."""
    if device == "cpu":
        return
    for kind in KINDS:
        yield from _captured(group, device, kind)


def _captured(group: Any, device: str, kind: Kind) -> Iterator[dict[str, Any]]:
    w, rank = weights_of(device, fmt=kind[0]), group.rank()
    ep = ExpertParallel(FusedMoE(w, K, 64, input_format=kind[1], use_cuda_graph=True), group)
    for way in ("gather", "dispatch"):
        x, ids, weights = call_of(rank, 48, "uniform", device)
        out = torch.empty_like(x)
        for _ in range(2):
            ep(x, ids, weights, out, way=way)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            ep(x, ids, weights, out, way=way)
        for seed in range(3):
            for old, new in zip(
                (x, ids, weights), call_of(10 * seed + rank, 48, "zipf:1.0", device), strict=True
            ):
                old.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            mine = error(out, truth(x, ids, weights, w, kind))
            worst = max(ep.peers.link.exchange("error", mine))
            yield {"kind": kind, "way": way, "replay": seed, "error": worst, "fine": worst < 0.01}


def devices(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """One process, a layer on each GPU: from one thread in turns, whatever the current device, and from a thread each."""
    if device == "cpu":
        return
    if group.rank() == 0:
        for kind in KINDS:
            yield from _on_each_device(kind)
    dist.barrier()


def _on_each_device(kind: Kind) -> Iterator[dict[str, Any]]:
    weights = {f"cuda:{i}": weights_of(f"cuda:{i}", fmt=kind[0]) for i in range(torch.cuda.device_count())}
    layers = {d: FusedMoE(w, K, 512, input_format=kind[1]) for d, w in weights.items()}
    calls = {d: call_of(1, 300, "zipf:1.0", d) for d in weights}
    expected = truth(*calls["cuda:0"], weights["cuda:0"], kind).cpu()

    def run(d: str) -> torch.Tensor:
        y = [layers[d](*calls[d]) for _ in range(5)][-1]
        torch.cuda.synchronize(d)
        return y.cpu()

    for how, threads in (("one thread", 1), ("a thread each", len(weights))):
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(run, weights))
        same = all(torch.equal(y, found[0]) for y in found)
        worst = max(error(y, expected) for y in found)
        yield {"kind": kind, "how": how, "devices": len(found), "same_bits": same, "error": worst,
               "fine": same and worst < 0.01}  # fmt: skip


def decisions(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """Ten tunings of the local experts, each from nothing: are the decisions the same on all ranks?"""
    w = weights_of(device)
    for run in range(3 if options.small else 10):
        tuner = AutoTuner(None, policy=QUICK)
        layer = FusedMoE(w, K, 64, use_cuda_graph=device != "cpu", tuner=tuner)
        ep = ExpertParallel(layer, group, way="gather")
        started = time.monotonic()
        with tuner.autotune(True, tuning_buckets=[8, 64], round_up=True):
            ep.tune(32, budget_s=4.0, progress=False)
            known = [ep.layer.decision(n) for n in (8, 64)]
        found = [None if d is None else [d.runner.backend, repr(d.tactic), d.status] for d in known]
        said = ep.peers.link.exchange("decisions", found)
        same = all(one == said[0] for one in said)
        seconds = time.monotonic() - started
        yield {
            "run": run,
            "decisions": said[0],
            "same": same,
            "fine": same and None not in found,
            "seconds": seconds,
        }


def deepseek(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """EP2 of 64 experts: ways and stages beside one rank with as many local pairs, and plain PyTorch."""
    shape, tokens = _shape(options)
    spec = bench.EpSpec(
        shape, tokens, Uniform(), device=device, rounds=options.rounds, plain=not options.no_plain
    )
    made = bench.Bench(spec, group)
    say(f"  made; dispatch is {type(made.ep.ways['dispatch']).__name__}")
    if made.plain is not None:
        _try_plain(made)
    for count in tokens:
        yield from _measured(made, count)
    yield _tuned_ways(made, tokens)


def skewed(group: Any, device: str, options: Any) -> Iterator[dict[str, Any]]:
    """The same under Zipf(1.0): contiguous shards, and placed for the loads with eight copies of hot experts."""
    shape, tokens = _shape(options)
    routing = parse("zipf:1.0")
    loads = (
        routing.sample(8192, shape.num_experts, shape.top_k, 0)
        .flatten()
        .bincount(minlength=shape.num_experts)
    )
    for placement in (None, place(loads, group.size(), replicas=8)):
        say(f"  {placement or 'contiguous'}")
        how = {"fp8": False, "plain": False, "placement": placement}
        made = bench.Bench(
            bench.EpSpec(shape, tokens, routing, device=device, rounds=options.rounds, **how), group
        )
        for count in tokens[1:]:
            for row in _measured(made, count):
                yield {"placement": str(placement or "contiguous"), **row}


def _shape(options: Any) -> tuple[Any, tuple[int, ...]]:
    if options.small:
        return replace(find("deepseek-v3"), num_experts=8, hidden_size=256, intermediate_size=128, top_k=3), (
            4,
            16,
        )
    return replace(find("deepseek-v3"), num_experts=64), tuple(map(int, options.tokens.split(",")))


def _measured(made: bench.Bench, count: int) -> Iterator[dict[str, Any]]:
    for row in made.at(count):
        stages = {name: round(seconds * 1e6, 1) for name, seconds in row.stages.items()}
        say(
            f"  N={row.tokens} {row.contender}: {row.seconds * 1e6:.1f} µs {stages} {row.efficiency} {row.difference}"
        )
        yield asdict(row)


def _try_plain(made: bench.Bench) -> None:
    """Leave the plain scheme out where this torch cannot run it; the same on all ranks."""
    x, ids, weights = made.call(4)
    try:
        made.plain.run(x, ids, weights, torch.empty_like(x))  # type: ignore[union-attr]
    except Exception as error:
        say(f"  plain is left out: {type(error).__name__}: {error}")
        made.plain = None


def _tuned_ways(made: bench.Bench, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Which way the tuner chooses, on every rank."""
    made.ep.layer.tuner.policy = QUICK
    made.ep.way = "auto"
    tune_ways(made.ep, max(tokens), buckets=sorted(tokens))
    agreed = AgreedWays(made.ep)
    picks = {str(n): way for n, way in zip(agreed.bounds, agreed.ways, strict=True)}
    said = made.ep.peers.link.exchange("picks", picks)
    say(f"  the tuner's ways: {said}")
    return {"ways": said[0], "evidence": _evidence(made), "fine": all(one == said[0] for one in said)}


def _evidence(made: bench.Bench) -> list[Any]:
    """What the tuner measured of the ways."""
    ep = made.ep
    tuner, runner, config = tuned.way_tuner(ep), tuned.WayRunner(ep), tuned.way_config(ep)
    found = []
    for size in made.spec.tokens:
        decision = tuner.decision(tuned.OP, [runner], config, tuned.way_example(ep, size))
        if decision is not None:
            found.append(
                [
                    size,
                    decision.evidence.reason,
                    [[str(c.tactic), c.ratio, c.low, c.high, c.reason] for c in decision.evidence.candidates],
                ]
            )
    say(f"  {found}")
    return found


def section(
    name: str, of: Callable[..., Iterator[dict[str, Any]]], group: Any, device: str, options: Any
) -> None:
    say(f"== {name}")
    rows: list[dict[str, Any]] = []
    path = Path(options.out) / f"{name}.json"
    try:
        for row in of(group, device, options):
            rows.append(row)
            if group.rank() == 0:
                path.write_text(json.dumps(_whole(name, rows, group, device), indent=1) + "\n")
        wrong = [row for row in rows if not row.get("fine", True)]
        say(f"   {len(rows)} rows, {len(wrong)} wrong {wrong[:3] if wrong else ''}")
        if name in ("decisions", "captured"):
            say(f"   {rows[:2]}")
    except Exception:
        print(f"rank {group.rank()}: {traceback.format_exc()}", flush=True)
        if os.environ.get("MOESTRO_SYMMETRIC_MEMORY") != "0" and device != "cpu":
            os.environ["MOESTRO_SYMMETRIC_MEMORY"] = "0"
            section(f"{name}_without_symmetric_memory", of, group, device, options)


def _whole(name: str, rows: list[dict[str, Any]], group: Any, device: str) -> dict[str, Any]:
    return {
        "schema": "moestro.gpu_ep/1", "section": name, "command": " ".join(sys.argv), "date": results.now(),
        "environment": results.environment(device), "ranks": group.size(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tokens", default="64,1024,4096")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--sections", default="equality,captured,devices,deepseek,decisions,skewed")
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    device, how = options.device, {}
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        how = {"device_id": torch.device(device)}
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=60), **how)
    group = dist.group.WORLD
    say(
        f"moestro {moestro.__version__}, torch {torch.__version__}, {results.environment(device)['device_name']}"
    )
    for name in options.sections.split(","):
        section(name, globals()[name], group, device, options)
    say("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

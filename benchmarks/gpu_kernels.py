"""Check and time the Triton kernels on a CUDA device: every variant in one process, no tuner in between.

    python benchmarks/gpu_kernels.py check                        numbers against the float32 reference
    python benchmarks/gpu_kernels.py stages qwen3 --tokens 1,16   each kernel of each variant alone
    python benchmarks/gpu_kernels.py layer qwen3 --tokens 1,16    whole layers, with torch._grouped_mm beside

Protocol: CUDA-graph replay between two events, 256 MiB written before each (cold L2), variants
alternate, median of `--rounds`. Routing is top-k of softmax(randn), seed 0. Results go to `--json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from moestro.formats import BF16, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, TritonRunner
from moestro.kernels.triton import choose as table
from moestro.kernels.triton.paths import dequantized, fused, warp_specialized
from moestro.kernels.triton.paths.path import weight_bytes
from moestro.moe import reference

MODELS = {  # L, K, H, I; all pairs local
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "deepseek": (32, 8, 7168, 2048),
    "gptoss20": (32, 4, 2880, 2880),
}
DEV = "cuda"
WIDE = [  # the table's tiles of the warp-specialized path, and others
    *warp_specialized.TABLE["packed"],
    *(
        warp_specialized.tactic(pairs, tile, narrow)
        for pairs, tile, narrow in (
            (128, Tile(256, 1, 8, 7), "quarters"),
            (256, Tile(128, 1, 8, 5), ""),
            (128, Tile(128, 1, 4, 4), "halves"),
            (64, Tile(128, 4, 4, 7), "quarters"),
        )
    ),
]


def random_nvfp4(experts: int, rows: int, columns: int, groups: int, gen: torch.Generator) -> NVFP4:
    """Random codes; scales around 1, one in 64 of them subnormal."""
    packed = torch.randint(
        0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEV, generator=gen
    )
    scale = torch.rand(experts, rows, columns // 16, device=DEV, generator=gen) + 0.5
    tiny = torch.rand(scale.shape, device=DEV, generator=gen) < 1 / 64
    scale = torch.where(tiny, scale * 2.0**-8, scale).to(torch.float8_e4m3fn)
    g = (torch.rand(experts, groups, device=DEV, generator=gen) + 0.5) * (0.33 / columns**0.5)
    return NVFP4(packed, scale, g if groups > 1 else g[:, 0])


def random_weights(fmt: str, experts: int, rows: int, columns: int, groups: int, gen: torch.Generator) -> Any:
    """Weights of a format whose products are about as large as what they multiply."""
    if fmt == "nvfp4":
        return random_nvfp4(experts, rows, columns, groups, gen)
    if fmt in ("bf16", "fp16"):
        dense = torch.empty(
            experts, rows, columns, dtype=torch.bfloat16 if fmt == "bf16" else torch.float16, device=DEV
        )
        for e in range(experts):
            dense[e] = torch.randn(rows, columns, device=DEV, generator=gen) / columns**0.5
        return BF16(dense)
    exponent = 127 - round(0.5 * math.log2(columns)) - 2 * (fmt == "mxfp4") - 6 * (fmt != "mxfp4")
    e8m0 = torch.randint(
        exponent - 3,
        exponent + 1,
        (experts, rows, columns // 32),
        dtype=torch.uint8,
        device=DEV,
        generator=gen,
    )
    if fmt == "mxfp4":
        packed = torch.randint(
            0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEV, generator=gen
        )
        return MXFP4(packed, e8m0)
    data = torch.randint(0, 255, (experts, rows, columns), dtype=torch.uint8, device=DEV, generator=gen)
    data = torch.where(data & 127 == 127, 0, data).view(torch.float8_e4m3fn)
    if fmt == "mxfp8":
        return MXFP8(data, e8m0)
    blocks = torch.rand(experts, -(-rows // 128), -(-columns // 128), device=DEV, generator=gen) + 0.5
    return FP8Block(data, blocks * 2.0 ** (exponent - 128))


def make(
    L: int, K: int, H: int, I: int, fmt: str, act: Any = None, bias: bool = False, inf: str | None = None,  # noqa: E741
    E: int = 0, offset: int = 0, seed: int = 0, dtype: torch.dtype = torch.bfloat16, invariant: bool = False,
) -> tuple[TritonRunner, Any]:  # fmt: skip
    """(runner, the same experts before they were repacked) on random weights."""
    act = act or SwiGLU()
    gen = torch.Generator(DEV).manual_seed(seed)
    rows = 2 * I if act.gated else I
    dtype = torch.float16 if fmt == "fp16" else dtype
    gate_up = random_weights(fmt, L, rows, H, 2 if act.gated else 1, gen)
    down = random_weights(fmt, L, H, I, 1, gen)
    rest = {
        "gate_up_bias": torch.randn(L, rows, device=DEV, generator=gen) if bias else None,
        "down_bias": torch.randn(L, H, device=DEV, generator=gen) if bias else None,
        "gate_up_input_scale": None,
        "down_input_scale": None,
    }
    p = MoeProblem(E or L, L, offset, K, H, I, gate_up.format, act, inf, dtype, "cuda",
                   weight_dtype=getattr(gate_up, "data", torch.empty(0)).dtype if fmt in ("bf16", "fp16") else None,
                   batch_invariant=invariant)  # fmt: skip
    plain = SimpleNamespace(gate_up=gate_up, down=down, **rest)
    g, d = TritonRunner.prepare(p, plain)
    runner = TritonRunner(p, SimpleNamespace(gate_up=g, down=d, **rest))
    return runner, plain


def inputs_of(runner: TritonRunner, n: int, seed: int = 0) -> list[torch.Tensor]:
    p = runner.problem
    gen = torch.Generator(DEV).manual_seed(seed)
    logits = torch.randn(n, p.num_experts, device=DEV, generator=gen)
    weights, ids = logits.softmax(-1).topk(p.top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    x = torch.randn(n, p.hidden_size, device=DEV, generator=gen).to(p.dtype)
    out = torch.full_like(x, float("nan"))
    return [x, ids.int().contiguous(), weights.float().contiguous(), out]


def error(
    runner: TritonRunner, plain: Any, inputs: list[torch.Tensor], tactic: Any, truth: Any = None
) -> float:
    x, _, _, out = inputs
    if truth is None:
        truth = truth_of(runner, plain, inputs)
    need = runner.workspace_bytes(len(x), tactic)
    runner.use_workspace(torch.full((need,), 0xFF, dtype=torch.uint8, device=DEV))  # NaN everywhere
    out.fill_(float("nan"))
    runner.forward(inputs, tactic)
    return ((out.float() - truth).norm() / truth.norm()).item()


def truth_of(runner: TritonRunner, plain: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    p = runner.problem
    torch.backends.cuda.matmul.allow_tf32 = False
    return reference.fused_moe(*inputs[:3], plain, activation=p.activation, input_format=p.input_format,
                               expert_offset=p.expert_offset)  # fmt: skip


def candidates(runner: TritonRunner, n: int) -> list[Tactic]:
    """The table, and warp-specialized tiles of every kind."""
    valid = table.candidates(runner.problem, n)
    found = [table.fitted(runner.problem, t) for t in valid + WIDE]
    return [t for t in dict.fromkeys(found) if table.why_not(runner.problem, t, n) is None]


def check() -> int:
    """Odd sizes, all activations, biases, offsets, foreign and invalid ids, W4A4, repeatability."""
    bad, worst = 0, 0.0
    acts = (SwiGLU(), SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2())
    made = []
    for i, (fmt, act) in enumerate(itertools.product(("nvfp4", "bf16"), acts)):
        sizes = ((8, 2, 272, 176), (6, 3, 512, 320), (16, 4, 144, 1040))[i % 3]
        runner, plain = make(*sizes, fmt, act, bias=i % 2 == 0, E=sizes[0] + 4, offset=2, seed=i)
        for n in (1, 3, 17, 257) if i % 4 == 0 else (3, 257):
            inputs = inputs_of(runner, n, i)
            inputs[1][0, 0] = (-7, 1 << 30, 10**6)[i % 3]
            tried = candidates(runner, n)
            tried = tried if i % 4 == 0 else tried[:1] + tried[-2:]
            made.append((runner, plain, inputs, tried))
    for fmt in ("nvfp4", "bf16"):  # several tiles an expert, full and not
        runner, plain = make(4, 2, 256, 192, fmt, seed=7)
        for n in (331, 700):
            made.append((runner, plain, inputs_of(runner, n, n), candidates(runner, n)))
    began = time.time()
    jobs = [(runner, (inputs, t)) for runner, _, inputs, tried in made for t in tried]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: job[0].compile(*job[1]), jobs))
    print(f"compiled {len(jobs)} tactics in {time.time() - began:.1f} s")
    for runner, plain, inputs, tried in made:
        truth = truth_of(runner, plain, inputs)
        for tactic in tried:
            e = error(runner, plain, inputs, tactic, truth)
            worst = max(worst, e)
            if not e < 1e-2:
                bad += 1
                print("BAD", runner.problem, len(inputs[0]), tactic, e)
            first = inputs[3].clone()
            runner.forward(inputs, tactic)
            if not torch.equal(first, inputs[3]):
                bad += 1
                print("NOT REPEATABLE", runner.problem, len(inputs[0]), tactic)
    print("worst error", worst)
    bad += check_w4a4()
    print("check:", "FAILED" if bad else "ok", bad)
    return bad


def check_w4a4() -> int:
    """NVFP4 activations, under dynamic and calibrated global scales."""
    bad = 0
    for n, dynamic in itertools.product((1, 17, 64), (True, False)):
        runner, plain = make(8, 2, 272, 176, "nvfp4", inf="nvfp4", seed=n)
        if not dynamic:
            for e in (plain, runner._experts):
                e.gate_up_input_scale = torch.rand(8, device=DEV) * 0 + 0.002
                e.down_input_scale = torch.tensor(0.004, device=DEV)
        inputs = inputs_of(runner, n, n)
        truth = truth_of(runner, plain, inputs)
        tried = candidates(runner, n)
        compile_all(runner, [(inputs, t) for t in tried])
        for tactic in tried:
            e = error(runner, plain, inputs, tactic, truth)
            print("w4a4", n, dynamic, tactic.path, tactic.route, f"{e:.2e}")
            bad += not e < 1e-2
    torch.cuda.synchronize()
    print("w4a4:", "FAILED" if bad else "ok", bad)
    return bad


def quick() -> int:
    """A few tactics of each kind on small sizes, for compute-sanitizer."""
    bad = 0
    for n in (3, 257):
        runner, plain = make(8, 2, 272, 176, "nvfp4", bias=True, E=12, offset=2)
        inputs = inputs_of(runner, n)
        inputs[1][0, 0] = 1 << 30
        kinds = {(t.path, t.route, t.narrow): t for t in table.candidates(runner.problem, n)}
        tried = list(kinds.values())
        compile_all(runner, [(inputs, t) for t in tried])
        for tactic in tried:
            bad += not error(runner, plain, inputs, tactic) < 1e-2
    torch.cuda.synchronize()
    print("quick:", "FAILED" if bad else "ok", bad)
    return bad


# ---------------------------------------------------------------------------------------------------- timing
class Clock:
    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEV)

    def graph(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return graph

    def once(self, replay: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3  # µs

    def medians(self, runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        samples: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for i in range(rounds + 2):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                t = self.once(runs[name])
                if i >= 2:
                    samples[name].append(t)
        return {name: statistics.median(s) for name, s in samples.items()}


def bytes_of(runner: TritonRunner, inputs: list[torch.Tensor]) -> tuple[int, int]:
    """Weight bytes of the experts that are hit: (GEMM 1, GEMM 2)."""
    p = runner.problem
    hit = len(torch.unique(inputs[1]))
    per = weight_bytes(p)
    return int(hit * p.gate_up_rows * p.hidden_size * per), int(
        hit * p.hidden_size * p.intermediate_size * per
    )


def flops_of(runner: TritonRunner, n: int) -> tuple[int, int]:
    p = runner.problem
    pairs = n * p.top_k
    return 2 * pairs * p.gate_up_rows * p.hidden_size, 2 * pairs * p.hidden_size * p.intermediate_size


def compile_all(runner: TritonRunner, jobs: list[tuple[list[torch.Tensor], Tactic]]) -> dict[int, str]:
    """Compile in threads; index -> why it failed."""
    failed = {}

    def one(i: int) -> None:
        try:
            runner.compile(*jobs[i])
        except Exception as error:
            failed[i] = f"{type(error).__name__}: {str(error)[:200]}"

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(len(jobs))))
    return failed


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


def short(t: Tactic) -> str:
    """A tactic in one word: path, route, pairs, how it narrows, tiles, split, group."""
    width = f"{t.pairs1}/{t.pairs2}" if t.pairs2 else str(t.pairs1)
    second = "" if t.gemm1 == t.gemm2 else f"+{tuple(t.gemm2)}"
    flags = {"": "", "quarters": "q", "halves": "h"}[t.narrow] + ("" if t.overlap_steps else "-")
    rest = f"s{t.split_k}g{t.raster_group}" + (f"k{t.prefetch_kib}" if t.prefetch_kib else "")
    return f"{t.path[0]}{t.route[0]}{width}{flags}{tuple(t.gemm1)}{second}{rest}".replace(" ", "")


def grouped_mm(inputs: list[torch.Tensor], gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The layer on torch._grouped_mm, as Transformers' grouped_mm experts do it."""
    x, ids, weights, _ = inputs
    n, k = ids.shape
    order = torch.argsort(ids.flatten(), stable=True)
    sorted_ids = ids.flatten()[order]
    bounds = torch.arange(gate_up.shape[0], device=x.device, dtype=ids.dtype)
    ends = torch.searchsorted(sorted_ids, bounds, right=True, out_int32=True)
    h = torch._grouped_mm(x[order // k], gate_up.transpose(-1, -2), offs=ends)
    gate, up = h.chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(-1, -2), offs=ends)
    y = y * weights.flatten()[order, None]
    back = torch.empty_like(y)
    back[order] = y.to(back.dtype)
    return back.view(n, k, -1).sum(1)


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
    parser.add_argument("command", choices=("check", "w4a4", "quick", "stages", "layer", "ceilings"))
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="every candidate, not only the default tactic")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    if args.command == "check":
        return int(check() > 0)
    if args.command == "w4a4":
        return int(check_w4a4() > 0)
    if args.command == "quick":
        return int(quick() > 0)
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

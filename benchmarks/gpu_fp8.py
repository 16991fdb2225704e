"""Check and time FP8 activations on a Hopper GPU: every tactic of the paths of FP8 products, in one process.

    PYTHONPATH=src python benchmarks/gpu_fp8.py check [--kinds nvfp4]         against the reference on odd sizes
    PYTHONPATH=src python benchmarks/gpu_fp8.py layers deepseek --tokens 16,1024 [--kinds nvfp4,fp8_block] [--json FILE]

Protocol of `layers`: CUDA-graph replay between two events, 256 MiB written before each (cold L2), variants alternate,
median of `--rounds`; beside them the same NVFP4 weights with bf16 activations and their default tactic. Each result is
compared with the reference of its numerics up to 64 tokens, beyond with the first tactic's. Kernels are compiled first, side
by side. A run that gets no further in 60 s ends, and keeps what it wrote to `--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moestro.formats import MXFP4, NVFP4, FP8Block
from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, TritonRunner, choose
from moestro.kernels.triton.paths import fp8, fp8_cuda, fp8_once, fp8_once_cuda
from moestro.moe import reference

MODELS = {  # L, K, H, I; all pairs local
    "deepseek": (32, 8, 7168, 2048),
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "gptoss20": (32, 4, 2880, 2880),
}
CASES: tuple[
    tuple[str, int, int, int, int, Activation, bool, int, int], ...
] = (  # format, L, K, H, I, ..., E, offset
    ("nvfp4", 8, 2, 512, 256, SwiGLU(), False, 8, 0),
    ("nvfp4", 4, 2, 720, 464, SwiGLU(), True, 16, 5),
    ("mxfp4", 4, 2, 704, 480, SwiGLU(1.702, 7.0, 1.0), True, 4, 0),
    ("mxfp4", 4, 2, 160, 96, ReLU2(), True, 4, 0),
    ("fp8_block", 8, 2, 512, 256, SwiGLU(), False, 8, 0),
    ("fp8_block", 4, 2, 720, 384, GeGLUTanh(), True, 16, 5),
    ("fp8_block", 4, 2, 144, 80, ReLU2(), True, 4, 0),
)
DEV, STALL = "cuda", 60.0


class Record:
    """Rows, printed and written as they come; ends the process when none has come for STALL seconds."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.last = path, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, **row: Any) -> None:
        self.last = time.monotonic()
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.path is not None:
            self.path.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")

    def _watch(self) -> None:
        while time.monotonic() - self.last < STALL:
            time.sleep(1)
        print(f"nothing for {STALL:.0f} s: a kernel hangs", flush=True)
        os._exit(3)


def weights(fmt: str, experts: int, rows: int, columns: int, gen: torch.Generator) -> Any:
    """Random ones; of NVFP4, one scale in 64 is subnormal."""
    packed = torch.randint(
        0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEV, generator=gen
    )
    if fmt == "nvfp4":
        scale = torch.rand(experts, rows, columns // 16, device=DEV, generator=gen) + 0.5
        tiny = torch.rand(scale.shape, device=DEV, generator=gen) < 1 / 64
        scale = torch.where(tiny, scale * 2.0**-8, scale).to(torch.float8_e4m3fn)
        return NVFP4(
            packed, scale, (torch.rand(experts, device=DEV, generator=gen) + 0.5) * (0.33 / columns**0.5)
        )
    if fmt == "mxfp4":
        shape = (experts, rows, columns // 32)
        return MXFP4(packed, torch.randint(117, 121, shape, dtype=torch.uint8, device=DEV, generator=gen))
    data = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=DEV)
    for e in range(experts):
        data[e] = torch.randn(rows, columns, device=DEV, generator=gen).to(torch.float8_e4m3fn)
    blocks = (experts, -(-rows // 128), -(-columns // 128))
    return FP8Block(data, (torch.rand(blocks, device=DEV, generator=gen) + 0.5) / columns**0.5)


def make(
    fmt: str, L: int, K: int, H: int, I: int, act: Activation, bias: bool, E: int, offset: int,  # noqa: E741
    input_format: str | None = "fp8",
) -> tuple[TritonRunner, Any]:  # fmt: skip
    """(runner, the same experts before they were repacked)."""
    gen = torch.Generator(DEV).manual_seed(H + I)
    rows = 2 * I if act.gated else I
    fields: dict[str, Any] = dict.fromkeys(
        ("gate_up_bias", "down_bias", "gate_up_input_scale", "down_input_scale")
    )
    if bias:
        fields["gate_up_bias"] = torch.randn(L, rows, device=DEV, generator=gen).bfloat16()
        fields["down_bias"] = torch.randn(L, H, device=DEV, generator=gen).bfloat16()
    raw = SimpleNamespace(gate_up=weights(fmt, L, rows, H, gen), down=weights(fmt, L, H, I, gen), **fields)
    problem = MoeProblem(
        E, L, offset, K, H, I, fmt, act, input_format, torch.bfloat16, "cuda", biased=bias, cuda_graph=True
    )
    if why := TritonRunner.why_not(problem):
        raise SystemExit(f"{fmt} with {input_format} activations does not run here: {why}")
    gate_up, down = TritonRunner.prepare(problem, raw)
    return TritonRunner(problem, SimpleNamespace(gate_up=gate_up, down=down, **fields)), raw


def inputs_of(p: MoeProblem, N: int) -> list[torch.Tensor]:
    gen = torch.Generator(DEV).manual_seed(N)
    logits = torch.randn(N, p.num_experts, device=DEV, generator=gen)
    ids = torch.topk(torch.softmax(logits, -1), p.top_k)[1].to(torch.int32)
    x = torch.randn(N, p.hidden_size, device=DEV, dtype=torch.bfloat16, generator=gen)
    return [x, ids, torch.rand(N, p.top_k, device=DEV, generator=gen), torch.full_like(x, float("nan"))]


def tactics_of(p: MoeProblem, N: int) -> list[Tactic]:
    rows = [t for path in (fp8, fp8_once, fp8_cuda, fp8_once_cuda) for t in path.TABLE["fp8"]]
    return [t for t in rows if choose.why_not(p, t, N) is None]


def near(p: MoeProblem, N: int) -> list[Tactic]:
    """Those whose tiles are not much wider than what an expert draws."""
    each = N * p.top_k / p.num_experts
    return [t for t in tactics_of(p, N) if t.pairs1 <= max(64, 4 * each)]


def words(t: Tactic) -> str:
    """Short, and unlike any other's."""
    return f"{t.path} {t.pairs1}x{t.gemm1.rows} {t.gemm1.warps}w"


def compile_all(jobs: dict[Any, Callable[[], Any]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job(), jobs.values()))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(float((a.float() - b.float()).norm() / b.float().norm()), 5)


def check(record: Record, formats: list[str]) -> int:
    """How many results are wrong: over 1e-2 from the reference of the same numerics, or other bits by tactic or batch."""
    wrong = 0
    for fmt, L, K, H, I, act, bias, E, offset in (case for case in CASES if case[0] in formats):  # noqa: E741
        runner, raw = make(fmt, L, K, H, I, act, bias, E, offset)
        for N in (1, 37, 700):
            x, tactics = inputs_of(runner.problem, N), tactics_of(runner.problem, N)
            compile_all({k: job for t in tactics for k, job in runner.compile_jobs(x, t).items()})
            ask = partial(reference.fused_moe, *x[:3], raw, activation=act, expert_offset=offset)
            own, exact, found = ask(input_format="fp8", weight_rounding="e4m3"), ask(), []
            for tactic in tactics:
                x[3].fill_(float("nan"))
                found.append(runner.forward(x, tactic).clone())
            one = [t[N // 2 : N // 2 + 1].clone() for t in x]
            alike = {t: y for y, t in zip(found, tactics, strict=True) if t.path in (fp8.NAME, fp8_once.NAME)}
            tactic, first = next(iter(alike.items()))
            alone = runner.forward(one, tactic)[0]
            same = all(torch.equal(y, first) for y in alike.values()) and torch.equal(alone, first[N // 2])
            errors = {words(t): error(y, own) for y, t in zip(found, tactics, strict=True)}
            worst = max(errors.values())
            wrong += not (worst < 1e-2 and same)
            record(
                check=fmt,
                N=N,
                H=H,
                I=I,
                tactics=len(found),
                own=worst,
                worst=max(errors, key=errors.__getitem__),
                exact=error(found[0], exact),
                same_bits=same,
            )
    return wrong


def layers(record: Record, models: list[str], tokens: list[int], rounds: int, formats: list[str]) -> None:
    """Time whole layers."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEV)
    for model in models:
        L, K, H, I = MODELS[model]  # noqa: E741
        kinds = (("nvfp4", None), *((fmt, "fp8") for fmt in formats))
        made = {kind: make(kind[0], L, K, H, I, SwiGLU(), False, L, 0, kind[1]) for kind in kinds}
        runners = {kind: runner for kind, (runner, _) in made.items()}
        for N in tokens:
            calls: dict[str, Callable[[], Any]] = {}
            errors: dict[str, float] = {}
            most = 0
            jobs: dict[Any, Callable[[], Any]] = {}
            for (fmt, input_format), runner in runners.items():
                x = inputs_of(runner.problem, N)
                for tactic in [-1] if input_format is None else near(runner.problem, N):
                    name = f"{fmt} {'bf16' if tactic == -1 else words(tactic)}"
                    calls[name] = partial(runner.forward, x, tactic)
                    most = max(most, runner.workspace_bytes(N, tactic))
                    jobs |= runner.compile_jobs(x, tactic)
            space = torch.empty(most, dtype=torch.uint8, device=DEV)  # one for all: graphs keep theirs
            calls = {name: partial(call, workspace=space) for name, call in calls.items()}
            compile_all(jobs)
            for fmt in formats:
                mine = {name: call for name, call in calls.items() if name.startswith(f"{fmt} f")}
                x = next(iter(mine.values())).args[0]
                truth = None
                if N <= 64:
                    truth = reference.fused_moe(*x[:3], made[fmt, "fp8"][1], activation=SwiGLU(),
                                                input_format="fp8", weight_rounding="e4m3")  # fmt: skip
                for name, call in mine.items():
                    x[3].fill_(float("nan"))
                    y = call().clone()
                    truth = y if truth is None else truth
                    errors[name] = error(y, truth)
            for name, us in times(calls, rounds, flush).items():
                tflops = round(6 * N * K * H * I / us / 1e6)
                record(model=model, N=N, what=name, us=us, tflops=tflops, error=errors.get(name))


def times(calls: dict[str, Callable[[], Any]], rounds: int, flush: torch.Tensor) -> dict[str, float]:
    graphs, samples = {}, {name: [] for name in calls}  # type: ignore[var-annotated]
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
    for i in range(rounds):
        for name, graph in graphs.items():
            flush.fill_(i)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e3)
    return {name: round(statistics.median(found), 1) for name, found in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "layers"))
    parser.add_argument("models", nargs="*", choices=[[], *MODELS])
    parser.add_argument("--tokens", default="16,64,256,1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--kinds", help="formats of weights; of layers NVFP4 unless said, besides NVFP4 with bf16 activations"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record = Record(args.json)
    if args.what == "check":
        return check(record, args.kinds.split(",") if args.kinds else [case[0] for case in CASES])
    tokens = [int(n) for n in args.tokens.split(",")]
    layers(record, args.models or list(MODELS), tokens, args.rounds, (args.kinds or "nvfp4").split(","))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

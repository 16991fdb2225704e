"""Every weight format on a CUDA device: numbers against the float32 reference, one order of sums, whole layers' times.

    python benchmarks/gpu_formats.py check [mxfp4+fp8 ...]  every tactic of every format (weights, activations) on odd
                                                            sizes, poisoned outputs, run twice; --seconds S at most
    python benchmarks/gpu_formats.py w4a4                   NVFP4 activations, under each kind of global scale
    python benchmarks/gpu_formats.py quick [int4 ...]       a few tactics of each kind, for compute-sanitizer
    python benchmarks/gpu_formats.py invariant nvfp4        which tactics give a row the same bits whatever its batch
    python benchmarks/gpu_formats.py layers --json out.json times, the default and what is worth measuring

Protocol and helpers are gpu_helpers.py's.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_helpers import (
    DEV,
    WIDE,
    Clock,
    bytes_of,
    compile_all,
    error,
    flops_of,
    inputs_of,
    make,
    short,
    truth_of,
)

from moestro.errors import BackendError
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.triton import Tactic, TritonRunner, choose
from moestro.kernels.triton.paths import fp8_cuda, fp8_once_cuda

FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4", "bf16")
THIRTY_TWO = ("mxfp4", "mxfp8", "int4")  # scales of 32 columns
INPUTS = ("fp8", None, "nvfp4")  # what is newest first, for a check that is cut short
GPT_OSS = SwiGLU(1.702, 7.0, 1.0)
LAYERS: dict[str, tuple[tuple[int, int, int, int], str, dict[str, Any]]] = {  # L, K, H, I; format; what else
    "gpt-oss-20b": ((32, 4, 2880, 2880), "mxfp4", {"act": GPT_OSS, "bias": True}),
    "gpt-oss-120b": ((128, 4, 2880, 2880), "mxfp4", {"act": GPT_OSS, "bias": True}),
    "qwen3-mxfp4": ((128, 8, 2048, 768), "mxfp4", {}),
    "mixtral-mxfp4": ((8, 2, 4096, 14336), "mxfp4", {}),
    "deepseek-mxfp4": ((32, 8, 7168, 2048), "mxfp4", {}),
    "deepseek-fp8": ((32, 8, 7168, 2048), "fp8_block", {}),
    "mixtral-fp8": ((8, 2, 4096, 14336), "fp8_block", {}),
    "qwen3-fp8": ((128, 8, 2048, 768), "fp8_block", {}),
    "nemotron-mxfp4": ((128, 6, 2688, 1856), "mxfp4", {"act": ReLU2()}),
    "kimi-int4": ((48, 8, 7168, 2048), "int4", {}),
    "qwen3-int4": ((128, 8, 2048, 768), "int4", {}),
    "qwen3-next-fp8": ((512, 10, 2048, 512), "fp8_block", {}),
}


def tactics_of(runner: TritonRunner, n: int) -> list[Tactic]:
    """The table's, and for NVFP4 other tiles of the warp-specialized path."""
    p = runner.problem
    more = WIDE if p.weight_format == "nvfp4" and n * p.top_k >= 64 else ()
    found = [*choose.candidates(p, n), *(choose.fitted(p, t) for t in more)]
    return [t for t in dict.fromkeys(found) if choose.why_not(p, t, n) is None]


# --- check ------------------------------------------------------------------------------------------------
def combinations(names: list[str]) -> list[tuple[str, str | None]]:
    """(format, input format) of texts like "mxfp4", "mxfp4+fp8"; all without any."""
    every = [(fmt, taken) for taken in INPUTS for fmt in FORMATS]
    if not names:
        return every
    asked = [(fmt, taken or None) for fmt, _, taken in (name.partition("+") for name in names)]
    if unknown := [pair for pair in asked if pair not in every]:
        raise SystemExit(f"no such format and input format: {unknown}; there are {every}")
    return asked


class Run(NamedTuple):
    """A tactic on inputs."""

    what: str
    runner: TritonRunner
    plain: Any
    inputs: list[torch.Tensor]
    tactic: Tactic
    kernels: tuple[Any, ...]  # keys of what must be compiled before


def whole_blocks(fmt: str, taken: str | None) -> bool:
    """Whether gate and up must be whole blocks of 128 rows."""
    return taken == "fp8" and fmt == "fp8_block"


def small_sizes(fmt: str, taken: str | None) -> tuple[int, int, int, int]:
    """L, K, H, I: odd ones, as far as the format has such."""
    if whole_blocks(fmt, taken):
        return 8, 2, 272, 256
    return (8, 2, 288, 160) if fmt in THIRTY_TWO else (8, 2, 272, 176)


def runs_of(fmt: str, taken: str | None, compiling: Callable[[Any, Any], None]) -> list[Run]:
    """Biases, experts of other ranks, invalid ids, all activations, both dtypes of x.

    compiling(key, job) is called with each kernel that they need.
    """
    found: list[Run] = []
    refused: set[str] = set()
    small, large = small_sizes(fmt, taken), (4, 2, 512, 384 if whole_blocks(fmt, taken) else 320)
    cases: list[tuple[Any, ...]] = [  # the last: all tactics, or a few of them, for its kernels are others
        (small, SwiGLU(), True, torch.bfloat16, (1, 3, 33, 257), True),
        (small, SwiGLU(), True, torch.float16, (5, 70), True),
        (large, GPT_OSS, False, torch.bfloat16, (700,), True),
        (small, GeGLUTanh(), True, torch.bfloat16, (5, 190), False),
        (small, ReLU2(), False, torch.float16, (5, 190), False),
    ]
    for i, (sizes, act, bias, dtype, tokens, every) in enumerate(cases):
        name = "fp16" if fmt == "bf16" and dtype == torch.float16 else fmt  # dense weights are of x's dtype
        try:
            runner, plain = make(
                *sizes, name, act, bias, taken, E=sizes[0] + 4, offset=2, seed=i, dtype=dtype
            )
        except BackendError as error:
            if str(error) not in refused:
                print(f"no kernels: {fmt}+{taken} {dtype}: {error}")
            refused.add(str(error))
            continue
        for n in tokens if DEV == "cuda" else tokens[:2]:
            inputs = inputs_of(runner, n, i)
            inputs[1][0, 0] = (-7, 1 << 30, 10**6)[i % 3]
            runner.use_workspace(None)
            tried = tactics_of(runner, n)
            for tactic in tried if every else dict.fromkeys(tried[:2] + tried[-2:]):
                mine = runner.compile_jobs(inputs, tactic) if DEV == "cuda" else {}
                for key, job in mine.items():
                    compiling(key, job)
                what = f"{fmt}+{taken} {sizes} {type(act).__name__} {dtype} N={n} {short(tactic)}"
                found.append(Run(what, runner, plain, inputs, tactic, tuple(mine)))
    return found


def check(names: list[str], seconds: float) -> int:
    """Every tactic of every format and input format on odd sizes, poisoned, twice, bit for bit; how many are wrong.

    All kernels are compiled in threads while what is compiled already runs. One run that takes a minute ends the process.
    """
    end, bad = time.monotonic() + seconds, 0
    waiting: dict[Any, Future[Any]] = {}
    pool = ThreadPoolExecutor(os.cpu_count())

    def compiling(key: Any, job: Callable[[], Any]) -> None:
        if key not in waiting:
            waiting[key] = pool.submit(job)

    plan = {pair: runs_of(*pair, compiling) for pair in combinations(names)}
    print(f"{sum(map(len, plan.values()))} runs, {len(waiting)} kernels", flush=True)
    for (fmt, taken), runs in plan.items():
        worst, done, wrong, truth = 0.0, 0, 0, (None, None)
        for run in runs:
            if time.monotonic() > end:
                break
            faulthandler.dump_traceback_later(90, exit=True)
            if truth[0] is not run.inputs:
                truth = run.inputs, truth_of(run.runner, run.plain, run.inputs)
            e, why = checked(run, truth[1], [waiting[key] for key in run.kernels])
            worst, done, wrong = max(worst, e), done + 1, wrong + bool(why)
            if why:
                print("BAD", run.what, why, flush=True)
        missed = len(runs) - done
        bad += wrong + bool(missed)
        print(f"check {fmt}+{taken}: {done} runs, worst error {worst:.1e}, {wrong} bad"
              + f", {missed} NOT REACHED" * bool(missed), flush=True)  # fmt: skip
    faulthandler.cancel_dump_traceback_later()
    pool.shutdown(wait=False, cancel_futures=True)
    return bad


def checked(run: Run, truth: Any, kernels: list[Future[Any]]) -> tuple[float, str]:
    """(error, what is wrong)."""
    try:
        for kernel in kernels:
            kernel.result()
        e = error(run.runner, run.plain, run.inputs, run.tactic, truth)
        first = run.inputs[3].clone()
        run.runner.forward(run.inputs, run.tactic)
        again = torch.equal(first, run.inputs[3])
    except Exception as failure:  # of one tactic: the others are still worth a look
        return 0.0, f"{type(failure).__name__}: {str(failure)[:160]}"
    return e, f"error {e:.2e}" if not e < 1e-2 else "" if again else "other bits the second time"


def check_w4a4() -> int:
    """NVFP4 activations, under dynamic and calibrated global scales."""
    bad = 0
    for n, dynamic in ((n, d) for n in (1, 17, 64) for d in (True, False)):
        runner, plain = make(8, 2, 272, 176, "nvfp4", inf="nvfp4", seed=n)
        if not dynamic:
            for e in (plain, runner._experts):
                e.gate_up_input_scale = torch.rand(8, device="cuda") * 0 + 0.002
                e.down_input_scale = torch.tensor(0.004, device="cuda")
        inputs = inputs_of(runner, n, n)
        truth = truth_of(runner, plain, inputs)
        tried = tactics_of(runner, n)
        compile_all(runner, [(inputs, t) for t in tried])
        for tactic in tried:
            e = error(runner, plain, inputs, tactic, truth)
            print("w4a4", n, dynamic, tactic.path, tactic.route, f"{e:.2e}")
            bad += not e < 1e-2
    torch.cuda.synchronize()
    print("w4a4:", "FAILED" if bad else "ok", bad)
    return bad


def quick(names: list[str], tokens: list[int]) -> int:
    """A few tactics of each kind on small sizes, for compute-sanitizer; NVFP4 unless formats are named."""
    runs: list[Run] = []
    jobs: dict[Any, Callable[[], Any]] = {}
    for fmt, taken in combinations(names or ["nvfp4"]):
        runner, plain = make(*small_sizes(fmt, taken), fmt, bias=True, inf=taken, E=12, offset=2)
        for n in tokens:
            inputs = inputs_of(runner, n)
            inputs[1][0, 0] = 1 << 30
            found = choose.candidates(runner.problem, n)
            # all tiles in CUDA C++, which compile fast
            kinds = {
                t
                if t.path in (fp8_once_cuda.NAME, fp8_cuda.NAME)
                else (t.path, t.route, t.narrow, t.overlap_steps): t
                for t in found
            }
            for tactic in kinds.values():
                jobs |= runner.compile_jobs(inputs, tactic) if DEV == "cuda" else {}
                what = f"{fmt}+{taken} N={n} {tactic.path} {short(tactic)}"
                runs.append(Run(what, runner, plain, inputs, tactic, ()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(job) for job in jobs.values()]:
            future.result()
    bad = 0
    for run in runs:
        e, why = checked(run, truth_of(run.runner, run.plain, run.inputs), [])
        bad += bool(why)
        print(f"{'BAD' if why else 'quick'} {run.what} error {e:.1e} {why}", flush=True)
    if DEV == "cuda":
        torch.cuda.synchronize()
    print("quick:", "FAILED" if bad else "ok", bad, "of", len(runs))
    return bad


def invariant(fmt: str, sizes: tuple[int, int, int, int] = (16, 4, 512, 384)) -> dict[str, int]:
    """Tactic -> rows, of those of several batches, that differ from one reference tactic's at N=512."""
    runner, _ = make(*sizes, fmt, bias=True, invariant=True)
    whole = inputs_of(runner, 512)
    runner.forward(whole, choose.fitted(runner.problem, choose.INVARIANT))
    truth, found = whole[3].clone(), {}
    for n in (1, 3, 8, 64, 255, 512):
        at = torch.randperm(512, generator=torch.Generator().manual_seed(n))[:n].cuda()
        inputs = [t[at].contiguous() for t in whole[:3]] + [torch.empty_like(whole[3][:n])]
        tried = tactics_of(runner, n)
        runner.use_workspace(None)
        compile_all(runner, [(inputs, t) for t in tried])
        for tactic in tried:
            runner.use_workspace(None)
            runner.forward(inputs, tactic)
            name = f"{tactic.path} {short(tactic)}"
            found[name] = found.get(name, 0) + int((inputs[3] != truth[at]).any(-1).sum())
    paths: dict[str, list[int]] = {}
    for name, rows in found.items():
        paths.setdefault(name.split()[0], []).append(rows)
    print("invariant", fmt, paths, {k: v for k, v in found.items() if v}, flush=True)
    return found


def single_blocks(tactic: Tactic) -> Tactic:
    """The tactic with steps of one block where it has three: both are worth a look."""
    tiles = [tile._replace(k_blocks=1) if tile.k_blocks == 3 else tile for tile in tactic.tiles]
    return replace(tactic, gemm1=tiles[0], gemm2=tiles[1])


def layers(
    names: list[str], tokens: list[int], rounds: int, every: bool, until: float, compile_only: bool = False
) -> list[dict[str, Any]]:
    """Times of the default, and of all that is worth measuring where `every`; the error of the fastest."""
    clock, rows = Clock(), []
    for name in names:
        sizes, fmt, rest = LAYERS[name]
        runner, plain = make(*sizes, fmt, **rest)
        for n in tokens:
            if time.time() > until or (compile_only and n > 4096):
                print("out of time before", name, n)
                return rows
            inputs, default = inputs_of(runner, n), choose.default(runner.problem, n)
            others = choose.worth_measuring(runner.problem, n) if every else []
            tried = list(dict.fromkeys([default, *others, *(single_blocks(t) for t in [default, *others])]))
            runner.use_workspace(None)
            failed = compile_all(runner, [(inputs, t) for t in tried])
            if compile_only:
                continue
            runs, keep = {}, []
            for i, tactic in enumerate(tried):
                if i in failed:
                    print("FAILED", name, n, tactic, failed[i])
                    continue
                runner.use_workspace(
                    torch.empty(runner.workspace_bytes(n, tactic), dtype=torch.uint8, device="cuda")
                )
                keep.append((clock.graph(partial(runner.forward, inputs, tactic)), runner._workspace))
                runs[str(i)] = keep[-1][0].replay
            times = clock.medians(runs, rounds)
            best = min(times, key=lambda i: times[i])
            moved, flops = sum(bytes_of(runner, inputs)), sum(flops_of(runner, n))
            checked = error(runner, plain, inputs, tried[int(best)]) if n <= 256 else None
            for i, us in times.items():
                rows.append({"layer": name, "format": fmt, "tokens": n, "us": round(us, 2),
                             "default": i == "0", "tactic": asdict(tried[int(i)]), "error": checked if i == best else None,
                             "tb_per_s": round(moved / us / 1e6, 3), "tflops": round(flops / us / 1e6, 1)})  # fmt: skip
            wrong = "" if checked is None else f" error {checked:.1e}"
            us = times[best]
            print(f"{name} N={n}: default {times['0']:.1f}, best {us:.1f} us ({short(tried[int(best)])}) "
                  f"{moved / us / 1e6:.2f} TB/s {flops / us / 1e6:.0f} TFLOP/s{wrong}", flush=True)  # fmt: skip
        del runner, plain
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("check", "w4a4", "quick", "invariant", "layers"))
    parser.add_argument("names", nargs="*", help="formats, or layers")
    parser.add_argument("--tokens", help="layers: 1 … 16384; quick: 3 and 257")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--all", action="store_true", help="everything worth measuring, not the default alone"
    )
    parser.add_argument("--compile", action="store_true", help="into Triton's cache, without running")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.command == "check":
        bad = check(args.names, args.seconds) + (check_w4a4() if not args.names and DEV == "cuda" else 0)
        print("check:", f"{bad} BAD" if bad else "ok")
        return int(bad > 0)
    if args.command in ("w4a4", "quick"):
        tokens = [int(t) for t in (args.tokens or "3,257").split(",")]
        return int((check_w4a4() if args.command == "w4a4" else quick(args.names, tokens)) > 0)
    rows: Any
    if args.command == "invariant":
        rows = {fmt: invariant(fmt) for fmt in args.names}
    else:
        tokens = [int(t) for t in (args.tokens or "1,16,64,256,1024,4096,16384").split(",")]
        rows = layers(
            args.names or list(LAYERS),
            tokens,
            args.rounds,
            args.all,
            time.time() + args.seconds,
            args.compile,
        )
    if args.json:
        with open(args.json, "w") as f:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "argv": sys.argv[1:]}
            json.dump({**about, "rows": rows}, f)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A session on a GPU machine in few calls, in order of value; docs/contributing.md has the commands.

    python benchmarks/gpu_session.py --list                 the calls, their steps, seconds and limits
    python benchmarks/gpu_session.py served  --out DIR      as served: invariance, verify steps, decode, load
    python benchmarks/gpu_session.py record  --out DIR      skewed routing beside humming and floors, models beside peers
    python benchmarks/gpu_session.py check   --out DIR      every tactic of every format, vLLM's method, replayed calls
    python benchmarks/gpu_session.py sanitizers --out DIR   FP8 products, dense and INT4 under compute-sanitizer
    python benchmarks/gpu_session.py tests   --out DIR      all of tests/gpu, side by side
    python benchmarks/gpu_session.py streams --out DIR      formats on two streams and in graphs, memcheck
    python benchmarks/gpu_session.py times   --out DIR      host time, layers, peers
    python benchmarks/gpu_session.py served --dry-run       here: the same programs on small layers of the CPU backend, the
                                                            interpreter, or at least whether a step's program starts

Each call ends within --seconds: every step is a process of its own with a limit, is killed with its children beyond
it, and leaves its output in session.log and a line of session.json; a step that fails does not stop the others, one
for which less than LEAST_S are left is not begun, and that is said. Exit status: steps that failed, missed their target
or were not begun. A later call on the same machine goes on with the compiled kernels of the first (TRITON_CACHE_DIR).
At most FILES files are in DIR after a call: a lent machine gives back so many.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_calls import CALLS, LIMIT_S, MISSED, Step

FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4", "bf16")
REPLAYED = (1, 3, 16, 64, 257, 1024)  # tokens
LEAST_S = 15  # of a step
FILES = 8
REPEATS = 8  # calls at the same addresses
TAIL = 6  # lines of a step's output on the console


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=[*CALLS, *CHECKS])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp/gpu-session")))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="of a call")
    parser.add_argument("--only", type=lambda text: text.split(","), help="steps of a call")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, REPLAYED)))
    options = parser.parse_args()
    if options.list or options.what is None:
        for name, steps in CALLS.items():
            print(f"{name}: about {sum(step.about_s for step in steps)} s")
            print(*(f"  {step.about_s:4d} s, at most {step.limit_s:3d} s  {step.name:16} {step.command}" for step in steps),
                  sep="\n")  # fmt: skip
        return 0
    if options.what in CHECKS:
        tokens = [int(n) for n in options.tokens.split(",")]
        return CHECKS[options.what](options.formats.split(","), tokens)
    return call(options.what, options)


def call(name: str, options: argparse.Namespace) -> int:
    """The steps of a call, within its time; how many did not end well."""
    end, failed = time.monotonic() + options.seconds, 0
    for step in CALLS[name]:
        if options.only and step.name not in options.only:
            continue
        left = end - time.monotonic()
        if left < LEAST_S:
            failed += 1
            print(f"{step.name}: not begun, {left:.0f} s are left", flush=True)
            continue
        step = step._replace(limit_s=min(step.limit_s, int(left)))
        failed += not run(step, options.out, options.dry_run)
    if (files := sum(path.is_file() for path in options.out.rglob("*"))) > FILES:
        print(f"{files} files in {options.out}, of which {FILES} can come back")
    return failed


def run(step: Step, out: Path, dry: bool) -> bool:
    """One step, killed with its children beyond its limit; whether it ended well. dry: only whether it starts."""
    out.mkdir(parents=True, exist_ok=True)
    command = step.command.replace("{out}", str(out))
    if dry:
        command = step.dry.replace("{out}", str(out)) or _help_of(command)
    env = {"TRITON_CACHE_DIR": "/tmp/gpu-session-triton", **os.environ}
    started, path = time.monotonic(), out / "session.log"
    with path.open("a") as log:
        print(f"\n$ {command}", file=log, flush=True)
        begin = log.tell()
        process = subprocess.Popen(
            command, shell=True, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            status = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    took = round(time.monotonic() - started, 1)
    line = {"step": step.name, "status": status, "seconds": took, "limit_s": step.limit_s, "command": command}
    with (out / "session.json").open("a") as session:
        session.write(json.dumps(line) + "\n")
    said = path.read_bytes()[begin:].decode(errors="replace").splitlines()
    tail = said[-TAIL:] if status == 0 else [text for text in said if "BAD" in text][:TAIL] + said[-TAIL:]
    print(
        f"{step.name}: status {status}{' (target missed)' * (status == MISSED)} after {took} s",
        *(f"    {text[:200]}" for text in tail),
        sep="\n",
        flush=True,
    )
    return status == 0


def _help_of(command: str) -> str:
    """The same program, told to say what it does: it and all that it imports are found. Not under the sanitizer."""
    words = shlex.split(command)
    if "compute-sanitizer" in words:
        words = words[words.index(sys.executable) :]
    return shlex.join([*words[:3], "--version"] if "-m" in words else [*words[:2], "--help"])


# --- checks, on the GPU -------------------------------------------------------------------------------------
def cases(formats: list[str], tokens: list[int]) -> Any:
    """(format, runner, tokens, tactic): the default and what is worth measuring."""
    from gpu_helpers import make

    from moestro.kernels.triton import choose

    for fmt in formats:
        runner, _ = make(8, 2, 512, 320, fmt, bias=True)
        for n in tokens:
            for tactic in (-1, *choose.worth_measuring(runner.problem, n)[:6]):
                yield fmt, runner, n, tactic


def compile_(formats: list[str], tokens: list[int]) -> int:
    """Everything that replay launches, side by side."""
    from concurrent.futures import ThreadPoolExecutor

    from gpu_helpers import inputs_of

    jobs: dict[Any, Any] = {}
    for _, runner, n, tactic in cases(formats, tokens):
        jobs |= runner.compile_jobs(inputs_of(runner, n), tactic)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job(), jobs.values()))
    print(len(jobs), "kernels")
    return 0


def replayed(runner: Any, n: int, tactic: Any, seed: int, bound: Any) -> tuple[Any, Any]:
    """(the result of an ordinary call, of the bound one) at addresses of their own."""
    import torch
    from gpu_helpers import inputs_of

    inputs = inputs_of(runner, n, seed)
    nbytes = runner.workspace_bytes(n, tactic)
    spaces = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(2)]
    want = runner.forward(inputs, tactic, workspace=spaces[0]).clone()
    other = [t.clone() for t in inputs[:3]] + [torch.full_like(inputs[3], float("nan"))]
    bound(other, spaces[1])
    return want, other[3]


def repeated(runner: Any, n: int, tactic: Any, bound: Any) -> int:
    """Calls with other contents at the same addresses, so that graphs are launched, that differ from ordinary ones."""
    import torch
    from gpu_helpers import inputs_of

    inputs, bad = inputs_of(runner, n), 0
    space = torch.empty(runner.workspace_bytes(n, tactic), dtype=torch.uint8, device="cuda")
    for seed in range(REPEATS):
        fresh = inputs_of(runner, n, seed + 10)
        for held, new in zip(inputs[:3], fresh[:3], strict=True):
            held.copy_(new)
        inputs[3].fill_(float("nan"))
        bound(inputs, space)
        bad += not torch.equal(runner.forward(fresh, tactic), inputs[3])
    return bad


def replay(formats: list[str], tokens: list[int]) -> int:
    """Replayed calls have the bits of ordinary ones; most calls are replayed."""
    import torch
    from gpu_helpers import inputs_of

    from moestro.kernels.triton import graphs as graphs_module
    from moestro.kernels.triton import replay as module

    compile_(formats, tokens)
    print("replay:", module.why_plain() or "on", "graphs:", graphs_module.driver() is not None)
    bad = count = used = 0
    whole = module.Replay.run

    def counted(self: Any, *args: Any) -> None:
        nonlocal used
        used += 1
        whole(self, *args)

    module.Replay.run = counted  # type: ignore[method-assign]
    for fmt, runner, n, tactic in cases(formats, tokens):
        bound = runner.bind(inputs_of(runner, n), tactic)
        for seed in range(4):
            want, got = replayed(runner, n, tactic, seed, bound)
            count += 1
            if not torch.equal(want.view(torch.int16), got.view(torch.int16)):
                bad += 1
                print(
                    f"{fmt} N={n} {tactic} call {seed}: {(want != got).sum().item()} of {got.numel()} differ"
                )
        differ = repeated(runner, n, tactic, bound)
        bad += differ
        if differ:
            print(f"{fmt} N={n} {tactic}: {differ} of {REPEATS} calls at the same addresses differ")
    torch.cuda.synchronize()
    print(f"{count} calls, {used} replayed, {bad} differ; {graphs_module.Graphs.alive} graphs alive")
    return int(bad > 0 or (module.why_plain() is None and used < count // 2))


def two_streams(formats: list[str], tokens: list[int]) -> int:
    """Two threads on two streams, one plan, no synchronisation in between: the bits of one stream alone."""
    import threading

    import torch
    from gpu_helpers import inputs_of

    bad: list[str] = []
    for fmt, runner, n, tactic in cases(formats, tokens[:4]):
        bound, nbytes = runner.bind(inputs_of(runner, n), tactic), runner.workspace_bytes(n, tactic)
        batches = [inputs_of(runner, n, seed) for seed in range(2)]
        wants = [runner.forward(b, tactic).clone() for b in batches]
        torch.cuda.synchronize()

        def work(i: int, n: int = n, bound: Any = bound, nbytes: int = nbytes, fmt: str = fmt, batches: Any = batches,
                 wants: Any = wants) -> None:  # fmt: skip
            with torch.cuda.stream(torch.cuda.Stream()):
                space = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                for _ in range(20):
                    bound(batches[i], space)
                torch.cuda.current_stream().synchronize()
                if not torch.equal(batches[i][3], wants[i]):
                    bad.append(f"{fmt} N={n} stream {i} differs")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(*bad[:20], f"{len(bad)} differ", sep="\n")
    return int(bool(bad))


def graphs(formats: list[str], tokens: list[int]) -> int:
    """A replayed call inside a CUDA graph, replayed ten times with other contents at the same addresses."""
    import torch
    from gpu_helpers import inputs_of

    bad = 0
    for fmt, runner, n, tactic in cases(formats, tokens[:4]):
        bound, inputs = runner.bind(inputs_of(runner, n), tactic), inputs_of(runner, n)
        space = torch.empty(runner.workspace_bytes(n, tactic), dtype=torch.uint8, device="cuda")
        for _ in range(2):
            bound(inputs, space)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bound(inputs, space)
        for seed in range(1, 4):
            fresh = inputs_of(runner, n, seed)
            for held, new in zip(inputs[:3], fresh[:3], strict=True):
                held.copy_(new)
            graph.replay()
            want = runner.forward(fresh, tactic)
            if not torch.equal(want, inputs[3]):
                bad += 1
                print(f"{fmt} N={n} {tactic} graph differs")
    print(f"{bad} differ")
    return int(bad > 0)


def eager(formats: list[str], tokens: list[int]) -> int:
    """Host time of a warm eager layer call, replayed and as ever, beside a trivial torch operation; µs."""
    import statistics

    import torch

    from moestro import ExpertWeights, FusedMoE
    from moestro.kernels.triton import replay as module

    dense = [torch.randn(32, r, c, device="cuda").bfloat16() for r, c in ((1536, 2048), (2048, 768))]
    layer = FusedMoE(ExpertWeights.from_dense(*dense, "nvfp4"), 8, max_num_tokens=1024, backend="triton")
    for n in (1, 16, 64, 256, 1024):
        x = torch.randn(n, 2048, device="cuda").bfloat16()
        ids = torch.stack([torch.randperm(32, device="cuda")[:8] for _ in range(n)]).int()
        weights, [runner] = torch.rand(n, 8, device="cuda"), layer.runners
        space = torch.empty(runner.workspace_bytes(n, -1), dtype=torch.uint8, device="cuda")
        inputs = [x, ids, weights, torch.empty_like(x)]
        ways = {
            "layer": lambda x=x, ids=ids, w=weights: layer(x, ids, w),
            "plain": lambda i=inputs, s=space, r=runner: r.forward(i, -1, workspace=s),
            "x + 1": lambda x=x: x + 1,
        }
        words = [f"N={n}"]
        for name, call in ways.items():
            times = []
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    call()
                times.append((time.perf_counter() - start) / 10 * 1e6)
            words.append(f"{name} {statistics.median(times):.1f}")
        print(", ".join(words))
    print("replay:", module.why_plain() or "on")
    return 0


CHECKS = {
    "compile": compile_,
    "replay": replay,
    "two-streams": two_streams,
    "graphs": graphs,
    "eager": eager,
}

if __name__ == "__main__":
    sys.exit(main())

"""One CPU in a minute: is every path right in this instruction set, and how fast is it beside others?

    MOESTRO_CPU_ISA=amx python benchmarks/cpu_machine.py --beside avx512 --json out.json

Needs torch and moestro alone (no pytest, no Transformers), for machines that are lent for minutes. Checks every
format, input format and tactic against the float32 reference, and that the number of threads changes no bit; then
times one Qwen3-30B-A3B layer (128 experts) in each instruction set, alternating, weights cold because a buffer of
four times the last-level cache is read before, beside this machine's own read and multiply rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import moestro
from moestro import ExpertWeights, machine, reference
from moestro.bench import roofline
from moestro.bench.models import find
from moestro.kernels.cpu import CpuRunner, CpuTactic, core
from moestro.kernels.problem import MoeProblem

TACTICS = (-1, CpuTactic(64, 2), CpuTactic(5, 1, 1), CpuTactic(48, 3, 4, 7))
EVICTED = torch.zeros(
    max(128 << 20, 4 * machine.cpu().cache_bytes), dtype=torch.uint8
)  # read before each sample
TOLERANCE = 4e-3  # two roundings to bf16 give 1.7e-3


def main() -> None:
    args = parse()
    isas = [core.choose_isa(), *args.beside]
    failures = [line for isa in isas for line in check(isa)]
    print(f"{len(failures)} failures on {', '.join(isas)}", flush=True)
    rows = [] if args.check_only else measure(isas, args)
    if args.json:
        args.json.write_text(json.dumps(report(args, isas, failures, rows), indent=1) + "\n")
    sys.exit(bool(failures) or any("error" in row for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=lambda text: text.split(","), default=[], metavar="ISA,ISA")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64, 512])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["nvfp4", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def force(isa: str) -> None:
    os.environ[core.ISA_VARIABLE] = isa


def check(isa: str) -> list[str]:
    """What is wrong on an instruction set, a line each."""
    force(isa)
    failures = []
    kinds = [("nvfp4", None), ("mxfp4", None), ("bf16", None), ("fp8_block", None), ("nvfp4", "int8")]
    for fmt, input_format in kinds:
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in (1, 3, 17, 70):
                failures += check_one(isa, fmt, input_format, dtype, tokens)
    return failures


def check_one(isa: str, fmt: str, input_format: str | None, dtype: torch.dtype, tokens: int) -> list[str]:
    weights = random_weights(6, 544, 160, fmt)
    x, ids, scores = draw(tokens, 6, 3, 544)
    x = x.to(dtype)
    problem = MoeProblem.of(weights, top_k=3, dtype=dtype, input_format=input_format)
    runner = CpuRunner(problem, weights)
    expected = reference.fused_moe(x, ids, scores, weights, input_format=input_format)
    found, before = [], torch.get_num_threads()
    for tactic in TACTICS:
        results = []
        for threads in (1, before):
            torch.set_num_threads(threads)
            results.append(runner.forward([x, ids, scores, torch.empty_like(x)], tactic))
        error = float((results[0].float() - expected).norm() / expected.norm())
        what = f"{isa} {fmt} {input_format} {dtype} N={tokens} {tactic}"
        if not error < TOLERANCE:
            found.append(f"{what}: error {error:.2g}")
        if not torch.equal(*results):
            found.append(f"{what}: {before} threads give other bits than one")
    for line in found:
        print(line, flush=True)
    return found


DRAWN = 4  # experts of which all others are copies, with rows of their own in memory


def random_weights(experts: int, hidden: int, inter: int, fmt: str) -> ExpertWeights:
    """A layer of normal values, quantised and packed as the backend keeps it, which is quick for a few experts."""
    few = ExpertWeights.from_dense(*dense_weights(min(experts, DRAWN), hidden, inter), fmt)
    packed = CpuRunner.prepare(MoeProblem.of(few, top_k=1), few)
    return ExpertWeights(*(repeated(panels, experts) for panels in packed))


def repeated(panels: Any, experts: int) -> Any:
    """Panels of so many experts: the first few over and over."""
    pieces = {f.name: getattr(panels, f.name) for f in dataclasses.fields(panels)}
    for name, piece in pieces.items():
        if isinstance(piece, torch.Tensor):
            whole = torch.empty((experts, *piece.shape[1:]), dtype=piece.dtype)
            core.load().moestro_cpu_advise_huge(whole.data_ptr(), whole.nbytes)  # as the backend keeps them
            for e in range(experts):
                whole[e] = piece[e % len(piece)]
            pieces[name] = whole
    return type(panels)(**pieces)


@functools.cache
def dense_weights(experts: int, hidden: int, inter: int) -> tuple[torch.Tensor, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).bfloat16()

    return normal(experts, 2 * inter, hidden), normal(experts, hidden, inter)


def draw(
    tokens: int, experts: int, top_k: int, hidden: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, ids = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    x = torch.randn(tokens, hidden).bfloat16()
    return x, ids.int().contiguous(), (scores / scores.sum(-1, keepdim=True)).contiguous()


def measure(isas: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    shape = find(args.model)
    runners: dict[tuple[str, str], CpuRunner] = {}
    for fmt in args.formats:
        name, _, input_format = fmt.partition("+")
        weights = random_weights(shape.num_experts, shape.hidden_size, shape.intermediate_size, name)
        problem = MoeProblem.of(weights, top_k=shape.top_k, input_format=input_format or None)
        for isa in isas:
            force(isa)
            runners[isa, fmt] = CpuRunner(problem, weights)
    ceilings: dict[str, roofline.Ceilings] = {}
    rows = []
    for tokens in args.tokens:
        raise_ceilings(ceilings, isas)
        rows += measure_tokens(runners, ceilings, shape, tokens, args)
    for row in rows:  # against the best of the run
        best = ceilings[row["isa"]]
        row["of_read"] = row["weight_gb_per_s"] * 1e9 / best.bytes_per_s
        row["of_rate"] = row["gop_per_s"] * 1e9 / best.rates.get(row["arithmetic"], best.flops_per_s)
    args.ceilings = {isa: dataclasses.asdict(found) for isa, found in ceilings.items()}
    for row in rows:
        if max(row["of_read"], row["of_rate"]) > roofline.MOST:
            row["error"] = (
                f"more than {roofline.MOST:.0%} of a ceiling: a fault of this measurement, no figure"
            )
            print(f"N={row['tokens']} {row['isa']} {row['format']}: {row['error']}", flush=True)
    return rows


def raise_ceilings(ceilings: dict[str, roofline.Ceilings], isas: list[str]) -> None:
    """The best of all measurements so far; reading is no matter of the instruction set."""
    for isa in isas:
        force(isa)
        found = roofline.measure_ceilings("cpu")
        ceilings[isa] = ceilings[isa].raised(found) if isa in ceilings else found
    read = max(found.bytes_per_s for found in ceilings.values())
    for isa, found in ceilings.items():
        ceilings[isa] = dataclasses.replace(found, bytes_per_s=read)
    print(f"reading {read / 1e9:.1f} GB/s", {isa: found.rates for isa, found in ceilings.items()}, flush=True)


def measure_tokens(
    runners: dict[tuple[str, str], CpuRunner], ceilings: dict[str, Any], shape: Any, tokens: int, args: Any
) -> list[dict[str, Any]]:
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    hit = []
    names = list(runners)
    for i in range(args.rounds + 1):  # the first warms up
        x, ids, scores = draw(tokens, shape.num_experts, shape.top_k, shape.hidden_size)
        hit.append(ids.unique().numel())
        out = torch.empty_like(x)
        for key in names[i % len(names) :] + names[: i % len(names)]:
            EVICTED.view(
                torch.int64
            ).sum()  # read, not written: write-backs would compete with what is measured
            start = time.perf_counter()
            runners[key].forward([x, ids, scores, out])
            samples[key].append(time.perf_counter() - start)
    rows = []
    for (isa, fmt), taken in samples.items():
        seconds, runner = statistics.median(taken[1:]), runners[isa, fmt]
        used = sum(p.nbytes for p in runner._weights) / shape.num_experts * statistics.mean(hit[1:])
        operations = 2 * tokens * shape.top_k * shape.weights_per_expert
        rate = ceilings[isa].rates.get(runner.arithmetic, ceilings[isa].flops_per_s)
        row = {
            **{"isa": isa, "format": fmt, "arithmetic": runner.arithmetic, "tokens": tokens},
            **{"median_ms": seconds * 1e3, "min_ms": min(taken[1:]) * 1e3, "samples": len(taken) - 1},
            **{
                "weight_gb_per_s": used / seconds / 1e9,
                "of_read": used / seconds / ceilings[isa].bytes_per_s,
            },
            **{"gop_per_s": operations / seconds / 1e9, "of_rate": operations / seconds / rate},
        }
        rows.append(row)
        print(
            f"N={tokens:5d} {isa:8s} {fmt:12s} {row['median_ms']:9.3f} ms  {row['weight_gb_per_s']:6.1f} GB/s "
            f"({row['of_read']:.0%})  {row['gop_per_s']:6.0f} GOP/s ({row['of_rate']:.0%} of {runner.arithmetic})",
            flush=True,
        )
    return rows


def report(args: argparse.Namespace, isas: list[str], failures: list[str], rows: list[Any]) -> dict[str, Any]:
    return {
        "what": f"one {args.model} layer on the CPU, instruction sets alternating, cold weights, medians",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": dataclasses.asdict(machine.cpu()),
        "threads": torch.get_num_threads(),
        "isas": isas,
        "load_average_after": os.getloadavg(),
        "torch": torch.__version__,
        "moestro": getattr(moestro, "__version__", None),
        "failures": failures,
        "ceilings": getattr(args, "ceilings", {}),
        "rows": rows,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

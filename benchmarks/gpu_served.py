"""A layer as it is served, beyond uniform routing in a graph: one subject a command, each a process of its own.

    python benchmarks/gpu_served.py verify    --json FILE    N = 2 … 8 tokens that share experts, against their bytes
    python benchmarks/gpu_served.py equal     --json FILE    batch_invariant=True: random batches, bit for bit
    python benchmarks/gpu_served.py cost      --json FILE    the same layer with and without batch_invariant, alternating
    python benchmarks/gpu_served.py sustained --json FILE    winners under seconds of load beside all other tactics
    python benchmarks/gpu_served.py host      --json FILE    a warm eager call, host time alone
    python benchmarks/gpu_served.py decode    --json FILE    a two-layer Qwen3-MoE in Transformers, eager decode steps
    python benchmarks/gpu_served.py skew RECORD --json FILE  ratios and floors of what gpu_record.py's skewed steps recorded
    ... --device cpu --tiny                                  the same program on small layers of the CPU backend
    TRITON_INTERPRET=1 ... --device cpu --tiny --interpret   and on those of the Triton kernels

FILE is written anew after every cell, so that a process that is killed loses nothing; no cell is begun after --seconds.
Times are medians over cold caches (a CUDA graph on a GPU), contenders alternating. Tactics are those that the
layer's decisions give: --store's or the shipped bundle's, else the default. Exit status 3: a target was missed, a cell
not reached, or nothing was measured; the last line says which.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moestro import FusedMoE
from moestro.bench import results
from moestro.bench.contenders import tactic_words
from moestro.bench.layers import Case, LayerSource, activation_of
from moestro.bench.models import MoeShape, find, from_sizes
from moestro.moe.call import as_inputs
from moestro.moe.tuning_config import OP
from moestro.tuning import AutoTuner, MeasurementPolicy
from moestro.tuning.measure.compile import jobs_of, precompile
from moestro.tuning.measure.timers import default_timer
from moestro.tuning.store.store import write_text_atomically

SCHEMA = "moestro.served/1"
MISSED = 3  # exit status
NEVER = 999.0  # a ratio that no bound allows, in JSON
RANKS = {"deepseek-v3": 8}  # whose share of the experts is measured, all pairs local


class Target(NamedTuple):
    """A figure of a row, the most it may be, and the share of rows for which it must hold."""

    figure: str
    most: float
    share: float = 1.0


class Rows:
    """The rows of one command, and the file that holds them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, list[dict[str, Any]]()
        self.end = time.monotonic() + options.seconds
        self.not_reached: list[str] = []
        self.failed: dict[str, str] = {}
        self._head = {
            "schema": SCHEMA,
            "what": options.what,
            "command": results.command_line(),
            "date": results.now(),
            "environment": results.environment(options.device),
        }

    def cells(self, cells: Sequence[Any], *of: Any) -> Iterator[Any]:
        """Those that are begun in time. of: what they belong to, for the names of the others."""
        for cell in cells:
            if time.monotonic() > self.end:
                self.not_reached.append(" ".join(map(str, (*of, cell))))
            else:
                yield cell

    @contextmanager
    def cell(self, name: Any) -> Iterator[None]:
        """What fails inside is said and written, and the next cell is begun."""
        try:
            yield
        except Exception as error:
            self.failed[str(name)] = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.print_exc()
            self.write()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.write()
        print(" ".join(f"{name} {_words(value)}" for name, value in row.items()), flush=True)

    def write(self, **more: Any) -> None:
        if self.options.json is None:
            return
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        head = json.dumps({**self._head, "not_reached": self.not_reached, "failed": self.failed, **more})[:-1]
        write_text_atomically(self.options.json, f'{head}, "rows": [\n{rows}\n]}}\n')

    def judged(self, target: Target, among: Callable[[dict[str, Any]], bool] = lambda row: True) -> int:
        """Exit status, once the share of rows that keep to the target is said and written."""
        judged = [row for row in self.rows if among(row)]
        share = sum(row[target.figure] <= target.most for row in judged) / max(1, len(judged))
        worst = max(judged, key=lambda row: row[target.figure], default=None)
        self.write(target=target._asdict(), share=share, worst=worst)
        missed = f"; NOT REACHED: {', '.join(self.not_reached)}" if self.not_reached else ""
        missed += f"; FAILED: {', '.join(self.failed)}" if self.failed else ""
        print(f"{self.options.what}: {target.figure} at most {target.most:g} in {share:.1%} of {len(judged)} rows, "
              f"{target.share:.0%} wanted; worst {worst}{missed}", flush=True)  # fmt: skip
        held = judged and share >= target.share and not self.not_reached and not self.failed
        return 0 if held else MISSED


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- layers ------------------------------------------------------------------------------------------------
def shape_of(model: str, options: argparse.Namespace) -> MoeShape:
    shape = find(model).on_ranks(RANKS.get(model, 1), model in RANKS)
    if not options.tiny:
        return shape
    small = from_sizes("8,2,64,32", shape.activation)
    return MoeShape(model, 64, 32, 8, 2, small.router, shape.activation, shape.biases)


def interpret() -> None:
    """Let the Triton backend take tensors of the CPU, whose kernels Triton interprets."""
    from moestro.kernels.triton import TritonRunner

    TritonRunner.why_not = classmethod(lambda cls, problem: cls._unsupported(problem))  # type: ignore


def tuner_of(options: argparse.Namespace) -> AutoTuner:
    return AutoTuner(store=options.store)


def layer_of(
    shape: MoeShape, format: str, most: int, tuner: AutoTuner, options: argparse.Namespace, **more: Any
) -> FusedMoE:
    """A layer of random weights, as it would be captured; the same weights for the same shape and format."""
    return FusedMoE(
        LayerSource(shape, device=options.device).weights(format),
        top_k=shape.top_k,
        max_num_tokens=most,
        use_cuda_graph=options.device.startswith("cuda"),
        activation=activation_of(shape),
        num_experts=shape.num_local_experts if shape.local_pairs else shape.num_experts,
        dtype=torch.bfloat16,
        tuner=tuner,
        donate=format != "bf16",
        **more,
    )


def inputs_of(case: Case) -> list[torch.Tensor]:
    return as_inputs(case.x, case.ids, case.weights, torch.empty_like(case.x))


def compile_all(pairs: Sequence[tuple[FusedMoE, Sequence[torch.Tensor]]]) -> None:
    """What these layers' decisions need for these inputs, side by side."""
    jobs: dict[Any, Any] = {}
    for layer, inputs in pairs:
        runner, tactic = layer.tuner.choose_one(OP, layer.runners, layer.tuning_config, inputs)
        jobs |= jobs_of(runner, inputs, tactic, (id(layer), len(inputs[0]), str(tactic)))
    compile_jobs(jobs)


def compile_jobs(jobs: dict[Any, Any]) -> None:
    """Side by side; what fails is said, and fails again when it is run."""
    began, failed = time.monotonic(), precompile(jobs)
    print(
        f"{len(jobs)} kernels compiled in {time.monotonic() - began:.1f} s, {len(failed)} failed", flush=True
    )
    for error in list(failed.values())[:3]:
        print(f"a kernel: {type(error).__name__}: {str(error)[:300]}", flush=True)


def chosen(layer: FusedMoE, num_tokens: int) -> str:
    """Backend, tactic and where it comes from."""
    decision = layer.decision(num_tokens)
    runner, tactic = (layer.runners[0], -1) if decision is None else (decision.runner, decision.tactic)
    words, source = tactic_words(tactic), "default" if decision is None else decision.status
    if tactic == -1 and callable(resolve := getattr(runner, "default_tactic", None)):
        ids = torch.empty(num_tokens, layer.top_k, dtype=torch.int32, device="meta")
        words = tactic_words(resolve([ids, ids]))
    return f"{runner.backend} {words} ({source})"


def samplers(
    calls: dict[Any, Callable[[], Any]], options: argparse.Namespace
) -> dict[Any, Callable[[], float]]:
    """A sampler a call: seconds, cold caches (but of tiny layers), as served."""
    timer = default_timer(options.device, policy_of(options), graph=options.device.startswith("cuda"))
    with torch.inference_mode():
        return {name: timer.prepare(call) for name, call in calls.items()}


def policy_of(options: argparse.Namespace, **more: Any) -> MeasurementPolicy:
    return MeasurementPolicy(cold_cache=not options.tiny, **more)


def alternate(lanes: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Samples of each, taken in turns whose order rotates."""
    names, found = list(lanes), {name: list[float]() for name in lanes}
    with torch.inference_mode():
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                found[name].append(lanes[name]())
    return found


def median_us(samples: Sequence[float]) -> float:
    return statistics.median(samples) * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    import served_decode
    import served_equal
    import served_host
    import served_layers
    import served_skew

    commands: dict[str, Callable[[Rows], int]] = {
        "verify": served_layers.verify,
        "cost": served_layers.cost,
        "sustained": served_layers.sustained,
        "equal": served_equal.equal,
        "host": served_host.host,
        "decode": served_decode.decode,
        "skew": served_skew.skew,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=commands)
    parser.add_argument("record", nargs="?", type=Path, help="skew: record.json of gpu_record.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--store", type=Path, help="of decisions")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=500, help="equal: so many")
    parser.add_argument("--formats", type=lambda text: text.split(","), help="equal: as in nvfp4+fp8")
    parser.add_argument("--load", type=float, default=5.0, help="sustained: seconds of load before each cell")
    parser.add_argument("--oracle", type=float, default=1.5, help="sustained: seconds of measuring each cell")
    parser.add_argument("--each", type=float, default=10.0, help="sustained: seconds of tuning a model")
    options = parser.parse_args(arguments)
    if options.what == "skew" and options.record is None:
        parser.error("skew: the record.json of gpu_record.py is missing")
    if options.interpret:
        interpret()
    return commands[options.what](Rows(options))


if __name__ == "__main__":
    sys.modules["gpu_served"] = sys.modules["__main__"]  # whose names its commands' modules import
    sys.exit(main())

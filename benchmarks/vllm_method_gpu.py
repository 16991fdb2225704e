"""vLLM's method class on a CUDA device, against stand-ins for the rest of the engine: experts of Qwen3-30B-A3B's and
gpt-oss-20b's shapes, random weights, timed beside torch's grouped_mm in bf16. Needs no vLLM.

    python benchmarks/vllm_method_gpu.py --out $OUT/vllm_method.json --limit-s 60
    python benchmarks/vllm_method_gpu.py --dry-run          on a CPU: small sizes, no graphs, numbers checked

What is timed is `apply`, as vLLM's runner calls it, captured in a CUDA graph: replays between two events, 256 MiB
written before each (cold L2), contenders alternate, medians. Routing: top-k of softmax(randn). Before that kernels
are compiled side by side, and outputs compared with the float32 reference. The JSON is written after every step; past
the limit the process writes where it stands (stderr) and ends with status 1. Memory: of the device, around repacking.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests/integrations/vllm_plugin")]

import gpu_helpers  # noqa: E402
from stand_ins import Config, MoEActivation, RoutedExperts, load, method_classes, quant_config  # noqa: E402

from moestro import ExpertWeights, reference  # noqa: E402
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor  # noqa: E402
from moestro.integrations.vllm import hooks, kinds, ranks  # noqa: E402
from moestro.integrations.vllm.settings import Settings  # noqa: E402
from moestro.kernels.activations import SwiGLU  # noqa: E402

BATCHES, ROUNDS, EAGER_CALLS, CHECKED = (1, 16, 64, 2048), 21, 30, 64
TOLERANCE = 1e-2  # of the reference's norm: inputs, weights and results are the same bf16 values
GPT_OSS = SwiGLU(1.702, 7.0, 1.0)


@dataclass(frozen=True)
class Case:
    """Experts that vLLM's class of this kind ("nvfp4", ...) holds: E, K, H, I; gpt_oss: its activation and biases."""

    kind: str
    sizes: tuple[int, int, int, int]
    gpt_oss: bool = False

    @property
    def activation(self) -> SwiGLU:
        return GPT_OSS if self.gpt_oss else SwiGLU()


CASES = {
    "qwen3-30b-a3b NVFP4": Case("nvfp4", (128, 8, 2048, 768)),
    "qwen3-30b-a3b bf16": Case("bf16", (128, 8, 2048, 768)),
    "gpt-oss-20b MXFP4": Case("mxfp4", (32, 4, 2880, 2880), gpt_oss=True),
}
SMALL = {
    "small NVFP4": Case("nvfp4", (8, 2, 256, 128)),
    "small bf16": Case("bf16", (8, 2, 256, 128)),
    "small MXFP4": Case("mxfp4", (8, 2, 256, 160), gpt_oss=True),
}


@dataclass(frozen=True)
class Made:
    """A layer behind vLLM's method class, and the values that its checkpoint stood for."""

    case: Case
    layer: RoutedExperts
    dense: ExpertWeights  # bf16
    mib: dict[str, float]

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer.quant_method.apply(self.layer, x, weights, ids, None, None)
        return result


class Record:
    """results, written to a file after every step, with the step's seconds."""

    def __init__(self, target: Path | None, device: str) -> None:
        self._target, self._began = target, time.monotonic()
        self.data: dict[str, Any] = {
            "command": "python " + " ".join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "versions": {"torch": torch.__version__, "triton": _triton_version()},
            "steps_s": {},
            "layers": {},
        }

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.data["steps_s"][name] = round(took, 2)
        print(f"[{time.monotonic() - self._began:5.1f} s] {name}: {took:.1f} s", flush=True)
        if self._target is not None:
            self._target.write_text(json.dumps(self.data, indent=1) + "\n")


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


# --- layers ----------------------------------------------------------------------------------------------
def make(case: Case, device: str, largest: int) -> Made:
    """Random weights through vLLM's names: created, loaded, processed."""
    moe = _config(case, device, largest)
    cls = getattr(method_classes(), case.kind)
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    with torch.device(device):
        method = cls(quant_config(), moe) if case.kind == "nvfp4" else cls(moe)
        if type(method) is cls:
            raise SystemExit(f"{case}: left to vLLM; its log line says why")
        layer = RoutedExperts(method)
    tensors, dense = random_experts(case, device)
    load(layer, **tensors)
    del tensors
    before = _mib(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    layer.quant_method.process_weights_after_loading(layer)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    experts = layer.quant_method.experts
    mib = {
        "loaded": before,
        "peak": peak,
        "after, with scratch memory": _mib(device),
        "packed": experts.weights.nbytes / 2**20,
        "scratch": experts.workspace.nbytes / 2**20,
    }
    return Made(case, layer, dense, {name: round(value, 1) for name, value in mib.items()})


def _config(case: Case, device: str, largest: int) -> Config:
    experts, top_k, hidden, inter = case.sizes
    return Config(
        num_experts=experts,
        num_local_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size_per_partition=inter,
        activation=MoEActivation.SWIGLUOAI if case.gpt_oss else MoEActivation.SILU,
        device=device,
        max_num_tokens=largest,
        max_capture_size=largest if device == "cuda" else 0,
        has_bias=case.gpt_oss,
    )


def random_experts(case: Case, device: str) -> tuple[dict[str, torch.Tensor], ExpertWeights]:
    """vLLM's tensors by name, and the bf16 experts that they stand for, gate rows first."""
    experts, _, hidden, inter = case.sizes
    gen = torch.Generator(device).manual_seed(0)
    weights = gpu_helpers.random_weights
    gate_up: FormatTensor = weights(case.kind, experts, 2 * inter, hidden, 2, gen)
    down: FormatTensor = weights(case.kind, experts, hidden, inter, 1, gen)
    tensors = {**_named("w13", gate_up), **_named("w2", down)}
    rows, biases = gate_up.dequantize(torch.bfloat16), {}
    if case.gpt_oss:  # rows of gate and up alternate in vLLM's parameters
        bias = torch.randn(experts, 2 * inter, device=device, generator=gen).bfloat16()
        down_bias = torch.randn(experts, hidden, device=device, generator=gen).bfloat16()
        tensors |= {"w13_bias": bias, "w2_bias": down_bias}
        biases = {"gate_up_bias": _halves(bias), "down_bias": down_bias}
        rows = _halves(rows)
    dense = ExpertWeights(BF16(rows), BF16(down.dequantize(torch.bfloat16)), **biases)
    return tensors, dense


def _named(name: str, tensor: FormatTensor) -> dict[str, torch.Tensor]:
    if isinstance(tensor, BF16):
        return {f"{name}_weight": tensor.data}
    assert isinstance(tensor, NVFP4 | MXFP4)
    found = {f"{name}_weight": tensor.packed, f"{name}_weight_scale": tensor.scale}
    if isinstance(tensor, NVFP4):
        found[f"{name}_weight_scale_2"] = tensor.global_scale
    return found


def _halves(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)


def _mib(device: str) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0


# --- calls -----------------------------------------------------------------------------------------------
def inputs_of(case: Case, num_tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights, ids, as vLLM's router hands them over."""
    experts, top_k, hidden, _ = case.sizes
    gen = torch.Generator(device).manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, device=device, generator=gen).bfloat16()
    logits = torch.randn(num_tokens, experts, device=device, generator=gen)
    weights, ids = logits.softmax(-1).topk(top_k)
    return x, weights / weights.sum(-1, keepdim=True), ids.int()


def grouped_mm(made: Made, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The layer on torch._grouped_mm in bf16, as Transformers' experts do it."""
    w, (n, k) = made.dense, ids.shape
    assert isinstance(w.gate_up, BF16)
    assert isinstance(w.down, BF16)
    order = torch.argsort(ids.flatten(), stable=True)
    of = ids.flatten()[order]
    bounds = torch.arange(w.num_experts, device=x.device, dtype=ids.dtype)
    ends = torch.searchsorted(of, bounds, right=True, out_int32=True)
    h = torch._grouped_mm(x[order // k], w.gate_up.data.transpose(-1, -2), offs=ends)
    if w.gate_up_bias is not None:
        h = h + w.gate_up_bias[of]
    gate, up = h.chunk(2, -1)
    if made.case.gpt_oss:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        a = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    else:
        a = torch.nn.functional.silu(gate) * up
    y = torch._grouped_mm(a, w.down.data.transpose(-1, -2), offs=ends)
    if w.down_bias is not None:
        y = y + w.down_bias[of]
    y = (y * weights.flatten()[order, None]).to(x.dtype)
    back = torch.empty_like(y)
    back[order] = y
    return back.view(n, k, -1).sum(1)


def compile_all(layers: list[Made], batches: tuple[int, ...], device: str) -> dict[str, Any]:
    """Every kernel of the tactics that will serve, side by side; what serves, by layer and tokens."""
    jobs: dict[Any, Callable[[], Any]] = {}
    said: dict[str, Any] = {}
    for i, made in enumerate(layers):
        experts = made.layer.quant_method.experts
        for n in batches:
            decision = experts.decision(n)
            runner, tactic = experts.runners[0], -1
            words = f"default: {runner.default_tactic([None, torch.empty(n, 1)]) if device == 'cuda' else -1}"
            if decision is not None:
                runner, tactic = decision.runner, decision.tactic
                words = f"{tactic} ({decision.status} at {decision.bucket}, {decision.source})"
            said[f"{i} {n}"] = f"{runner.backend} {words}"
            if hasattr(runner, "compile_jobs"):
                x, weights, ids = inputs_of(made.case, n, device)
                found = runner.compile_jobs([x, ids, weights, torch.empty_like(x)], tactic)
                jobs |= {(i, key): job for key, job in found.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job(), jobs.values()))
    return {"kernels": len(jobs), "serves": said}


def check(made: Made, device: str) -> dict[str, float]:
    """Errors of apply and of grouped_mm, of the float32 reference's norm. SystemExit beyond the tolerance."""
    x, weights, ids = inputs_of(made.case, CHECKED, device)
    truth = reference.fused_moe(x.float(), ids, weights, made.dense, activation=made.case.activation)
    errors = {}
    for name, run in contenders(made, x, weights, ids).items():
        errors[name] = float((run().float() - truth).norm() / truth.norm())
    print("errors", {name: f"{value:.1e}" for name, value in errors.items()}, flush=True)
    if not max(errors.values()) < TOLERANCE:
        raise SystemExit(f"{made.case}: errors {errors}, at most {TOLERANCE} are expected")
    return errors


def contenders(made: Made, *call: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    return {"Moestro": lambda: made.apply(*call), "grouped_mm bf16": lambda: grouped_mm(made, *call)}


def times(made: Made, num_tokens: int, device: str) -> dict[str, Any]:
    """Medians in µs: replays of graphs, and whole eager calls of apply one after another."""
    call = inputs_of(made.case, num_tokens, device)
    runs = contenders(made, *call)
    eager = []
    for _ in range(EAGER_CALLS):
        began = time.perf_counter()
        runs["Moestro"]()
        if device == "cuda":
            torch.cuda.synchronize()
        eager.append((time.perf_counter() - began) * 1e6)
    found: dict[str, Any] = {"eager call": round(statistics.median(eager), 1)}
    if device == "cuda":
        clock = gpu_helpers.Clock()
        graphs = {name: clock.graph(run).replay for name, run in runs.items()}
        found |= {name: round(value, 1) for name, value in clock.medians(graphs, ROUNDS).items()}
    print(f"{num_tokens:>5} tokens", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=60)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.limit_s, exit=True)
    device, cases, batches = ("cpu", SMALL, (1, 16, 64)) if options.dry_run else ("cuda", CASES, BATCHES)
    gpu_helpers.DEV = device
    ranks.link = lambda moe: None  # no other ranks, and no vLLM to ask for them
    record = Record(options.out, device)
    layers: dict[str, Made] = {}
    for name, case in cases.items():
        with record.step(f"make {name}"):
            layers[name] = make(case, device, max(batches))
            record.data["layers"][name] = {"sizes": case.sizes, "mib": layers[name].mib}
    with record.step("compile"):
        record.data["compiled"] = compile_all(list(layers.values()), batches, device)
    for name, made in layers.items():
        with record.step(f"check {name}"):
            record.data["layers"][name]["errors"] = check(made, device)
    for name, made in layers.items():
        found = record.data["layers"][name].setdefault("us", {})
        for n in batches:
            with record.step(f"time {name} {n}"), torch.inference_mode():
                found[n] = times(made, n, device)


if __name__ == "__main__":
    main()

"""What the GPU scripts share: layers on random weights, their errors, and a clock.

Protocol: CUDA-graph replay between two events, 256 MiB written before each (cold L2), variants alternate, medians.
Routing is top-k of softmax(randn), seed 0.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from moestro.errors import BackendError
from moestro.formats import BF16, INT4, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.kernels.activations import SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, TritonRunner
from moestro.kernels.triton.paths import warp_specialized
from moestro.kernels.triton.paths.path import weight_bytes
from moestro.moe import reference

MODELS = {  # L, K, H, I; all pairs local
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "deepseek": (32, 8, 7168, 2048),
    "gptoss20": (32, 4, 2880, 2880),
}
DEV = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
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
    if fmt == "int4":  # zero points, and fp16 scales per 32
        shape = (experts, rows, columns // 32)
        packed = torch.randint(
            0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEV, generator=gen
        )
        scale = (torch.rand(shape, device=DEV, generator=gen) + 0.5) / (5 * columns**0.5)
        zero = torch.randint(6, 11, shape, dtype=torch.uint8, device=DEV, generator=gen)
        return INT4(packed, scale.half(), zero)
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
    if reason := TritonRunner._unsupported(p):
        raise BackendError(reason)
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
    rounding = "e4m3" if p.input_format == "fp8" else None  # of 4-bit weights; others are as they are
    return reference.fused_moe(*inputs[:3], plain, activation=p.activation, input_format=p.input_format,
                               expert_offset=p.expert_offset, weight_rounding=rounding)  # fmt: skip


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

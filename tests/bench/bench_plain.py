"""The layer written out plainly, apart from everything under test; and a result to draw and compare."""

from __future__ import annotations

import torch

from moestro.bench.layers import Case, LayerSource, activation_of
from moestro.bench.models import from_sizes
from moestro.bench.results import BenchResult, Row


def plain_moe(source: LayerSource, case: Case) -> torch.Tensor:
    """The layer in float32, pair by pair: [N, H]."""
    gate_up, down = (part.float() for part in source.dense)
    biases = [None if bias is None else bias.float() for bias in source.biases]
    activation = activation_of(source.shape)
    y = torch.zeros(case.num_tokens, source.shape.hidden_size)
    for n in range(case.num_tokens):
        for k in range(source.shape.top_k):
            e = int(case.ids[n, k])
            if e >= source.shape.num_local_experts:
                continue
            h = gate_up[e] @ case.x[n].float()
            h = h if biases[0] is None else h + biases[0][e]
            out = down[e] @ activation(h)
            out = out if biases[1] is None else out + biases[1][e]
            y[n] += case.weights[n, k] * out
    return y


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def some_result() -> BenchResult:
    """A result of two contenders at N = 1 and 4: Moestro twice as fast as its peer."""

    def row(tokens: int, ours: bool) -> Row:
        median = 0.001 * tokens * (1 if ours else 2)
        return Row(
            tokens=tokens,
            contender="moestro nvfp4" if ours else "transformers eager",
            ours=ours,
            format="nvfp4" if ours else "bf16",
            median_s=median,
            low_s=median * 0.9,
            high_s=median * 1.1,
            samples=9,
            clock="steady",
            experts_hit=2 * tokens,
            tflops=0.1,
            weight_bytes_per_s=1e9,
            roofline=0.5,
            ratio_to_best_peer=2.0 if ours else 1.0,
            facts={"backend": "cpu", "tactic": None, "status": "default"} if ours else {},
        )

    memory = [
        {"contender": "transformers eager", "format": "bf16", "bytes": 98304, "ratio_to_bf16": 1.0},
        {"contender": "moestro nvfp4", "format": "nvfp4", "bytes": 27648, "ratio_to_bf16": 0.28125},
    ]
    return BenchResult(
        command="moestro bench --sizes 8,2,64,32",
        date="2026-01-02T03:04:05Z",
        environment={"device": "cpu", "device_name": "Figure & co", "threads": 2, "torch": "2.13.0"},
        problem=from_sizes("8,2,64,32").to_json(),
        conditions={"routing": "uniform", "layers": 1, "seed": 0},
        ceilings={"bytes_per_s": 3e10, "flops_per_s": 5e11, "dtype": "bfloat16"},
        memory=memory,
        rows=[row(tokens, ours) for tokens in (1, 4) for ours in (False, True)],
    )

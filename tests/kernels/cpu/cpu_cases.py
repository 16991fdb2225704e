"""Small problems for the CPU backend, and its error against the float32 reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from moestro import ExpertWeights, reference
from moestro.kernels.activations import Activation, SwiGLU
from moestro.kernels.cpu import CpuRunner, CpuTactic
from moestro.kernels.problem import MoeProblem

# Every path: codes multiplied as they are decoded, decoded first, in units of a few tokens, in several waves.
TACTICS = (
    -1,
    CpuTactic(token_tile=64, row_tile=2),
    CpuTactic(token_tile=5, row_tile=1, dequant_from=1),
    CpuTactic(token_tile=48, row_tile=3, dequant_from=4, wave=7),
)


@dataclass(frozen=True)
class Case:
    """A layer of L experts of E, and how x is routed."""

    fmt: str = "nvfp4"
    hidden: int = 80  # five blocks of 16: half a chunk, and half a tile of rows, are left over
    inter: int = 48
    experts: int = 6
    top_k: int = 3
    activation: Activation = SwiGLU()  # noqa: RUF009
    biases: bool = False
    offset: int = 0
    total: int | None = None  # E, where it is more than L
    dtype: torch.dtype = torch.bfloat16  # of x
    input_format: str | None = None
    batch_invariant: bool = False

    @property
    def problem(self) -> MoeProblem:
        return MoeProblem(
            num_experts=self.total or self.experts,
            num_local_experts=self.experts,
            expert_offset=self.offset,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            weight_format=self.fmt,
            activation=self.activation,
            biased=self.biases,
            dtype=self.dtype,
            input_format=self.input_format,
            batch_invariant=self.batch_invariant,
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def weights(self) -> ExpertWeights:
        """The layer's weights, shared between tests: not to be changed."""
        return self.fresh_weights()

    def fresh_weights(self) -> ExpertWeights:
        g = torch.Generator().manual_seed(0)
        rows = self.problem.gate_up_rows
        gate_up = torch.randn(self.experts, rows, self.hidden, generator=g) * self.hidden**-0.5 * 2
        down = torch.randn(self.experts, self.hidden, self.inter, generator=g) * self.inter**-0.5
        bias = {}
        if self.biases:
            bias = {
                "gate_up_bias": torch.randn(self.experts, rows, generator=g).bfloat16(),
                "down_bias": torch.randn(self.experts, self.hidden, generator=g),
            }
        return ExpertWeights.from_dense(gate_up.bfloat16(), down.bfloat16(), self.fmt, **bias)

    def call(self, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(num_tokens, self.hidden, generator=g).to(self.dtype)
        scores = torch.rand(num_tokens, self.total or self.experts, generator=g)
        ids = scores.topk(self.top_k).indices.int().contiguous()
        return x, ids, torch.rand(num_tokens, self.top_k, generator=g)

    def expected(self, call: tuple[torch.Tensor, ...], w: ExpertWeights) -> torch.Tensor:
        options = {
            "activation": self.activation,
            "expert_offset": self.offset,
            "input_format": self.input_format,
        }
        return reference.fused_moe(*call, w, **options)


def run(runner: CpuRunner, call: tuple[torch.Tensor, ...], tactic: Any = -1) -> torch.Tensor:
    """The runner's result, in an `out` that held NaN."""
    out = torch.full_like(call[0], float("nan"))
    assert runner.forward([*call, out], tactic) is out
    return out


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm().clamp(min=1e-12))


def with_layout(problem: MoeProblem, w: ExpertWeights) -> MoeProblem:
    return replace(problem, weight_layout=w.layout, weight_dtype=w.dense_dtype)


INVARIANT = [  # (format, input format) of which rows do not depend on their batch
    ("nvfp4", None),
    ("mxfp4", None),
    ("bf16", None),
    ("fp8_block", None),
    ("int4", None),
    ("nvfp4", "int8"),
]


def rows_alone(runner: CpuRunner, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each token of the call in a call of its own."""
    return torch.cat([run(runner, tuple(t[i : i + 1] for t in call)) for i in range(len(call[0]))])

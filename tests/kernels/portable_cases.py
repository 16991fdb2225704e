"""A problem of the portable backend beside its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moestro import ExpertWeights, SwiGLU, formats, reference
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.problem import MoeProblem

E, K = 11, 3
TACTICS: list[Any] = [
    ("loop", 1),
    ("pairs", 3),
    ("grouped", 4),
    ("grouped", 0),
    ("masked", 4),
    ("blocks", 16),
]
FORMATS = sorted(formats.FORMATS)
ACTIVATIONS = ["silu", "gelu_tanh", "relu2", SwiGLU(alpha=1.702, limit=0.5, up_shift=1.0)]


@dataclass
class Case:
    """A problem with its weights, and its runner."""

    runner: PortableRunner
    w: ExpertWeights

    @property
    def problem(self) -> MoeProblem:
        return self.runner.problem

    def inputs(self, num_tokens: int, seed: int = 0, experts: list[int] | None = None) -> list[Any]:
        """x, ids (distinct, of `experts` if given), weights, and an output full of NaN."""
        g = torch.Generator().manual_seed(seed)
        p = self.problem
        x = torch.randn(num_tokens, p.hidden_size, generator=g).to(p.dtype)
        pool = torch.tensor(experts if experts is not None else range(p.num_experts), dtype=torch.int32)
        order = torch.rand(num_tokens, len(pool), generator=g).argsort(-1)
        ids = pool[order[:, : p.top_k]]
        weights = torch.rand(num_tokens, p.top_k, generator=g)
        return [x, ids.contiguous(), weights, torch.full_like(x, torch.nan)]

    def reference(self, inputs: list[Any]) -> torch.Tensor:
        x, ids, weights, _, *scales = inputs
        p = self.problem
        return reference.fused_moe(
            NVFP4(x, *scales) if scales else x,
            ids,
            weights,
            self.w,
            activation=p.activation,
            input_format=p.input_format,
            expert_offset=p.expert_offset,
        )

    def error(self, inputs: list[Any], tactic: Any) -> float:
        """Relative error norm, in a poisoned workspace of exactly the bytes asked for."""
        num_tokens = inputs[0].shape[0]
        nbytes = self.runner.workspace_bytes(num_tokens, tactic)
        self.runner.use_workspace(torch.full((nbytes,), 0xFF, dtype=torch.uint8))
        out = self.runner.forward(inputs, tactic)
        assert out is inputs[3]
        assert not torch.isnan(out).any()
        expected = self.reference(inputs)
        return float((out - expected).norm() / expected.norm().clamp(min=1e-12))


def make(
    fmt: str = "bf16",
    activation: str | Activation = "silu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    offset: int = 0,
    local: int | None = None,
    bias: bool = False,
    scales: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case of E experts (those from offset to 3 before the last, if there is an offset)."""
    g = torch.Generator().manual_seed(seed)
    hidden, inter = (96, 160) if formats.get(fmt).block == 32 else (48, 80)
    act = resolve_activation(activation)
    held = local or (E - offset - 3 if offset else E)
    rows = 2 * inter if act.gated else inter

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.2

    dense_dtype = dtype if fmt == "bf16" else torch.float32
    scale_shape = {"one": (), "each": (held,)}.get(scales or "")
    w = ExpertWeights.from_dense(
        randn(held, rows, hidden).to(dense_dtype),
        randn(held, hidden, inter).to(dense_dtype),
        fmt,
        gate_up_bias=randn(held, rows) if bias else None,
        down_bias=randn(held, hidden).bfloat16() if bias else None,
        gate_up_input_scale=None if scale_shape is None else torch.full(scale_shape, 2e-3),
        down_input_scale=None if scale_shape is None else torch.full(scale_shape, 1e-3),
    )
    problem = MoeProblem(
        num_experts=E,
        num_local_experts=held,
        expert_offset=offset,
        top_k=K,
        hidden_size=hidden,
        intermediate_size=inter,
        weight_format=fmt,
        activation=act,
        dtype=dtype,
        weight_dtype=w.dense_dtype,
        biased=w.biased,
        **options,
    )
    return Case(PortableRunner(problem, w), w)


def fits(case: Case, tactic: Any, num_tokens: int) -> bool:
    return case.runner.unfit(tactic, num_tokens) is None

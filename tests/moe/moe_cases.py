"""Small layers and calls for the operator's tests."""

from __future__ import annotations

from typing import Any

import torch

from moestro import ExpertWeights, formats, reference

E, K, H, I = 7, 3, 48, 80  # noqa: E741


def make_weights(
    fmt: str = "nvfp4",
    *,
    experts: int = E,
    gated: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **extra: Any,
) -> ExpertWeights:
    """Random weights of E experts, H=48, I=80 (formats in blocks of 32: 96, 160)."""
    g = torch.Generator().manual_seed(seed)
    hidden, inter = (2 * H, 2 * I) if formats.get(fmt).block == 32 else (H, I)
    gate_up = torch.randn(experts, 2 * inter if gated else inter, hidden, generator=g) * 0.2
    down = torch.randn(experts, hidden, inter, generator=g) * 0.2
    return ExpertWeights.from_dense(gate_up.to(dtype), down.to(dtype), fmt, **extra)


def make_call(
    num_tokens: int,
    *,
    hidden: int = H,
    experts: int = E,
    top_k: int = K,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, H], ids int32 [N, K] (distinct), weights float32 [N, K]."""
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(num_tokens, hidden, generator=g).to(dtype)
    ids = torch.rand(num_tokens, experts, generator=g).argsort(-1)[:, :top_k].int().contiguous()
    return x, ids, torch.rand(num_tokens, top_k, generator=g)


def error(
    y: torch.Tensor, x: Any, ids: torch.Tensor, weights: torch.Tensor, w: ExpertWeights, **options: Any
) -> float:
    """Relative error norm against the float32 reference."""
    expected = reference.fused_moe(x, ids, weights, w, **options)
    return float((y.float() - expected).norm() / expected.norm().clamp(min=1e-12))

"""A layer with our method, called, beside the truth."""

from __future__ import annotations

from typing import Any

import torch
from stand_ins import (
    Config,
    RoutedExperts,
    load,
    method_classes,
    quant_config,
)

import moestro
from moestro.integrations.vllm import hooks, kinds
from moestro.integrations.vllm.settings import Settings

TOLERANCE = 2e-2  # of the largest value: x and the result are bf16


def make_layer(
    moe: Config, name: str, tensors: dict[str, torch.Tensor], settings: Settings | None = None, **layer: Any
) -> RoutedExperts:
    """A layer of vLLM's method class `name` with the plugin installed, loaded and processed."""
    cls = getattr(method_classes(), name)
    hooks.install(cls, kinds.KINDS[cls.__name__], settings or Settings())
    made = RoutedExperts(cls(quant_config(), moe) if name == "nvfp4" else cls(moe), **layer)
    load(made, **tensors)
    made.quant_method.process_weights_after_loading(made)
    return made


def call(layer: RoutedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer.quant_method.apply(layer, x, weights, ids, None, None)
    return result


def inputs(moe: Config, num_tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, moe.hidden_dim, generator=make).to(moe.in_dtype)
    logits = torch.randn(num_tokens, moe.num_experts, generator=make)
    weights, ids = logits.softmax(-1).topk(moe.experts_per_token)
    return x, weights, ids


def truth(
    values: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    biases = {name: options.pop(name, None) for name in ("gate_up_bias", "down_bias")}
    w = moestro.ExpertWeights.from_dense(*values, format="bf16", **biases)
    return moestro.reference.fused_moe(x.float(), ids, weights, w, **options)


def assert_near(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    if expected.numel():
        assert float((actual.float() - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())

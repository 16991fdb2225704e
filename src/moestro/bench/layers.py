"""Random weights and inputs of a layer, made in bounded memory.

Weights come expert by expert from a seed, so a quantised layer never stands beside a dense copy of all
experts, and every format of one (shape, seed, layer) holds the same values: what one contender
gets, all get.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moestro import formats
from moestro.bench.models import MoeShape
from moestro.kernels.activations import Activation, SwiGLU, resolve_activation
from moestro.routing import Distribution, sample_weights
from moestro.workers import lone_workers

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["Case", "LayerSource", "activation_of", "make_case"]

T = TypeVar("T")

GPT_OSS_SWIGLU = SwiGLU(alpha=1.702, limit=7.0, up_shift=1.0)


def activation_of(shape: MoeShape) -> Activation:
    """The activation that a shape names."""
    return GPT_OSS_SWIGLU if shape.activation == "swiglu_oai" else resolve_activation(shape.activation)


@dataclass(frozen=True)
class Case:
    """One call's inputs."""

    num_tokens: int
    x: torch.Tensor  # [N, H]
    ids: torch.Tensor  # [N, K] int32, global; this rank holds [0, L)
    weights: torch.Tensor  # [N, K] float32


@dataclass(frozen=True)
class LayerSource:
    """The weights of one layer of a shape, for a seed."""

    shape: MoeShape
    layer: int = 0
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2I, H] and down [H, I] of one expert in `dtype`, of about unit gain."""
        shape = self.shape
        rng = torch.Generator(self.device).manual_seed((self.seed << 40) + (self.layer << 20) + index)
        gate_up = torch.empty(shape.gate_up_rows, shape.hidden_size, device=self.device)
        down = torch.empty(shape.hidden_size, shape.intermediate_size, device=self.device)
        gate_up.normal_(std=shape.hidden_size**-0.5, generator=rng)
        down.normal_(std=shape.intermediate_size**-0.5, generator=rng)
        return gate_up.to(self.dtype), down.to(self.dtype)

    @cached_property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [L, 2I, H] and down [L, H, I] in `dtype`; made once, shared by everyone who asks."""
        shape = self.shape
        rows, hidden, inter = shape.gate_up_rows, shape.hidden_size, shape.intermediate_size
        gate_up = torch.empty(shape.num_local_experts, rows, hidden, dtype=self.dtype, device=self.device)
        down = torch.empty(shape.num_local_experts, hidden, inter, dtype=self.dtype, device=self.device)

        def fill(index: int) -> None:
            gate_up[index], down[index] = self.expert(index)

        self._for_experts(fill)
        return gate_up, down

    @cached_property
    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """gate_up_bias [L, 2I] and down_bias [L, H] in `dtype`, or None for a shape without biases."""
        if not self.shape.biases:
            return None, None
        count = self.shape.num_local_experts
        rng = torch.Generator(self.device).manual_seed((self.seed << 40) + (self.layer << 20) + (1 << 19))
        sizes = (self.shape.gate_up_rows, self.shape.hidden_size)
        first, second = (
            torch.empty(count, size, device=self.device).normal_(std=0.1, generator=rng).to(self.dtype)
            for size in sizes
        )
        return first, second

    def _for_experts(self, make: Callable[[int], T]) -> list[T]:
        """make(index) for every local expert, in order; on a CPU each expert in one thread."""
        indices = range(self.shape.num_local_experts)
        if self.device != "cpu":
            return [make(index) for index in indices]
        with lone_workers("experts") as pool:
            made = list(pool.map(make, indices))
        _return_memory()
        return made

    def weights(self, format: str) -> ExpertWeights:
        """The layer in a number format.

        "bf16" shares the dense tensors; the others are quantised one expert at a time.
        """
        from moestro.moe.weights import ExpertWeights

        kind: Any = formats.get(format)
        if format == "bf16":
            gate_up, down = (kind.quantize(part) for part in self.dense)
        else:
            pieces = self._for_experts(lambda index: tuple(map(kind.quantize, self.expert(index))))
            gate_up, down = (kind.stack([piece[side] for piece in pieces]) for side in (0, 1))
        return ExpertWeights(gate_up, down, *self.biases)


def _return_memory() -> None:
    """Hand freed memory back: glibc keeps 0.2 to 0.5 GB of the threads' temporaries otherwise (measured)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_case(
    shape: MoeShape,
    num_tokens: int,
    routing: Distribution,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Inputs of N tokens: x ~ N(0, 1), ids from the distribution, positive weights that sum to the router's
    scale.

    Where the model weights the expert's input (Llama-4), x is scaled here and the weights are one, so that
    every contender runs the same call.
    """
    rng = torch.Generator().manual_seed(seed)
    experts = shape.num_local_experts if shape.local_pairs else shape.num_experts
    ids = routing.sample(num_tokens, experts, shape.top_k, seed=seed)
    x = torch.randn(num_tokens, shape.hidden_size, generator=rng)
    weights = sample_weights(num_tokens, shape.top_k, seed=seed) * shape.router.scale
    if shape.router.weights_on_input:
        scores = torch.sigmoid(torch.randn(num_tokens, 1, generator=rng))
        x, weights = x * scores, torch.ones_like(weights)
    return Case(num_tokens, x.to(device, dtype), ids.to(device), weights.to(device))

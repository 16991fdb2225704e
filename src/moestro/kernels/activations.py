"""Activations between the two matrix products of an expert.

A gated activation takes [..., 2I] (gate half first, then up) to [..., I]; one without a gate takes [..., I]
to [..., I]. Each is a frozen dataclass, so that it can be part of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from moestro.errors import BackendError, unknown_name


class Activation(Protocol):
    """What an expert does between its two matrix products."""

    @property
    def gated(self) -> bool:
        """Whether the input has a gate half and an up half."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """[..., 2I] (or [..., I] without a gate) -> [..., I], in h.dtype."""


@dataclass(frozen=True)
class SwiGLU:
    """(up + up_shift) · gate · sigmoid(alpha · gate).

    With `limit`, gate is clamped from above to `limit` and up to ±limit first: gpt-oss uses
    SwiGLU(alpha=1.702, limit=7.0, up_shift=1.0). The defaults are plain SwiGLU, "silu".
    """

    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0

    gated = True

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)  # [..., I] each
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        act = F.silu(gate) if self.alpha == 1.0 else gate * torch.sigmoid(self.alpha * gate)
        return act * (up + self.up_shift if self.up_shift else up)


@dataclass(frozen=True)
class GeGLUTanh:
    """gelu(gate, tanh approximation) · up."""

    gated = True

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True)
class ReLU2:
    """relu(h)², without a gate (Nemotron-3)."""

    gated = False

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return F.relu(h).square()


@dataclass(frozen=True)
class ClampedSilu:
    """min(silu(gate), limit) · clamp(up, ±limit): clamped after silu (Step-3.7), where SwiGLU clamps before."""

    limit: float

    gated = True

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class SoftcapSwiGLU:
    """cap(gate) · sigmoid(gate) · cap(up), cap(v) = tanh(v / c) · c with a c for each (Inkling2)."""

    gate_cap: float
    up_cap: float

    gated = True

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        capped = torch.tanh(gate / self.gate_cap) * self.gate_cap
        return capped * torch.sigmoid(gate) * (torch.tanh(up / self.up_cap) * self.up_cap)


ACTIVATIONS: dict[str, Activation] = {"silu": SwiGLU(), "gelu_tanh": GeGLUTanh(), "relu2": ReLU2()}


def resolve_activation(activation: str | Activation) -> Activation:
    """The activation for a name, or the activation itself.

    Raises BackendError for an unknown name, with the nearest known ones.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise BackendError(unknown_name("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]

"""Activations between the two matrix products of an expert, as data.

A gated activation takes [..., 2I] (gate half first, then up) to [..., I]; one without a gate takes [..., I]
to [..., I]. Each is a frozen dataclass, so that it can be part of a key, and says what kernels need of it in one
`Form`: the number of its formula, and the formula's parameters. Backends read that and list no classes. A new
activation is a class here, and its formula in the device code of the backends that are to have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from moestro.errors import BackendError, unknown_name

Sigmoid = Callable[[torch.Tensor], torch.Tensor]


class Code(IntEnum):
    """Formulas, as compiled kernels number them (csrc/moestro_cpu.h, triton/device/common.py and ends.cuh)."""

    SWIGLU = 0
    GEGLU_TANH = 1
    RELU2 = 2
    CLAMPED_SILU = 3
    SOFTCAP_SWIGLU = 4


class Form(NamedTuple):
    """All that a kernel needs to know of an activation. What a formula has no use for has its default."""

    code: Code
    gated: bool
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0


def _number(name: str, value: Any, positive: bool = False) -> float:
    try:
        number = float(value)
        fine = not isinstance(value, bool | str) and (number > 0 if positive else math.isfinite(number))
    except (TypeError, ValueError):
        fine = False
    if not fine:
        wanted = "positive" if positive else "finite"
        raise BackendError(f"{name} must be a {wanted} number, got {value!r}")
    return number


class Activation(Protocol):
    """What an expert does between its two matrix products."""

    @property
    def gated(self) -> bool:
        """Whether the input has a gate half and an up half."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """[..., 2I] (or [..., I] without a gate) -> [..., I], in h.dtype."""


class Formula:
    """An activation of ours: `form` as data, `apply` as PyTorch."""

    code: ClassVar[Code]
    gated: ClassVar[bool]

    @property
    def form(self) -> Form:
        return Form(self.code, self.gated)

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        """The activation of h in h.dtype, with this sigmoid: the only function in any of them that is not
        elementary arithmetic."""
        raise NotImplementedError

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return self.apply(h)


@dataclass(frozen=True)
class SwiGLU(Formula):
    """(up + up_shift) · gate · sigmoid(alpha · gate).

    With `limit`, gate is clamped from above to `limit` and up to ±limit first: gpt-oss uses
    SwiGLU(alpha=1.702, limit=7.0, up_shift=1.0). The defaults are plain SwiGLU, "silu".
    Raises BackendError for an alpha or up_shift that is not finite, and a limit that is not positive.
    """

    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0

    code: ClassVar[Code] = Code.SWIGLU
    gated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("alpha", "up_shift"):
            object.__setattr__(self, name, _number(f"{name} of SwiGLU", getattr(self, name)))
        if self.limit is not None:
            limit = _number("limit of SwiGLU", self.limit, positive=True)
            object.__setattr__(self, "limit", None if math.isinf(limit) else limit)

    @property
    def form(self) -> Form:
        return Form(self.code, self.gated, self.alpha, self.limit, self.up_shift)

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)  # [..., I] each
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        if self.alpha == 1.0 and sigmoid is torch.sigmoid:
            act = F.silu(gate)
        else:
            act = gate * sigmoid(gate if self.alpha == 1.0 else self.alpha * gate)
        return act * (up + self.up_shift if self.up_shift else up)


@dataclass(frozen=True)
class GeGLUTanh(Formula):
    """gelu(gate, tanh approximation) · up."""

    code: ClassVar[Code] = Code.GEGLU_TANH
    gated: ClassVar[bool] = True

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        if sigmoid is torch.sigmoid:
            return F.gelu(gate, approximate="tanh") * up
        cubic = gate * gate * gate * 0.044715 + gate  # (1 + tanh z) / 2 = sigmoid(2 z)
        return gate * sigmoid(cubic * (2 * math.sqrt(2 / math.pi))) * up


@dataclass(frozen=True)
class ReLU2(Formula):
    """relu(h)², without a gate (Nemotron-3)."""

    code: ClassVar[Code] = Code.RELU2
    gated: ClassVar[bool] = False

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        return F.relu(h).square()


@dataclass(frozen=True)
class ClampedSilu(Formula):
    """min(silu(gate), limit) · clamp(up, ±limit): clamped after silu (Step-3.7), where SwiGLU clamps before."""

    limit: float

    code: ClassVar[Code] = Code.CLAMPED_SILU
    gated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", _number("limit of ClampedSilu", self.limit, positive=True))

    @property
    def form(self) -> Form:
        return Form(self.code, self.gated, limit=self.limit)

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        act = F.silu(gate) if sigmoid is torch.sigmoid else gate * sigmoid(gate)
        return act.clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class SoftcapSwiGLU(Formula):
    """cap(gate) · sigmoid(gate) · cap(up), cap(v) = tanh(v / c) · c with a c for each (Inkling2).

    Its form has the gate's cap as alpha, and up's as limit.
    """

    gate_cap: float
    up_cap: float

    code: ClassVar[Code] = Code.SOFTCAP_SWIGLU
    gated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("gate_cap", "up_cap"):
            cap = _number(f"{name} of SoftcapSwiGLU", getattr(self, name), positive=True)
            object.__setattr__(self, name, cap)

    @property
    def form(self) -> Form:
        return Form(self.code, self.gated, alpha=self.gate_cap, limit=self.up_cap)

    def apply(self, h: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return _capped(gate, self.gate_cap, sigmoid) * sigmoid(gate) * _capped(up, self.up_cap, sigmoid)


def _capped(v: torch.Tensor, cap: float, sigmoid: Sigmoid) -> torch.Tensor:
    if sigmoid is torch.sigmoid:
        return torch.tanh(v / cap) * cap
    return (sigmoid(v / cap * 2) * 2 - 1) * cap  # tanh z = 2 sigmoid(2 z) - 1


ACTIVATIONS: dict[str, Activation] = {"silu": SwiGLU(), "gelu_tanh": GeGLUTanh(), "relu2": ReLU2()}
CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (SwiGLU, GeGLUTanh, ReLU2, ClampedSilu, SoftcapSwiGLU)
}


def form_of(activation: Activation) -> Form | None:
    """What kernels need of an activation; None for a caller's own (a subclass, too), which only PyTorch can run."""
    return (
        activation.form if isinstance(activation, Formula) and type(activation) in CLASSES.values() else None
    )


def why_not(activation: Activation, codes: frozenset[Code]) -> str | None:
    """Why a backend whose kernels have these formulas cannot run an activation; None if it can."""
    form = form_of(activation)
    if form is not None and form.code in codes:
        return None
    known = ", ".join(name for name, cls in CLASSES.items() if cls.code in codes)
    return f"it has no kernel for the activation {activation!r}; it has {known}"


def resolve_activation(activation: str | Activation) -> Activation:
    """The activation for a name, or the activation itself.

    Raises BackendError for an unknown name, with the nearest known ones.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise BackendError(unknown_name("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]

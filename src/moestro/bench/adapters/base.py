"""What an adapter to somebody else's kernels is, and the contender that it makes.

An adapter says whether its package is here and fits a shape (`missing`), and turns one layer's weights into a
PeerLayer (`prepare`), whose `bind` gives the call for a case. Everything else (several layers, checks, timing)
is the bench's. Nothing of the package is imported before `missing` or `prepare` is asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["Adapter", "AdapterContender", "PeerLayer", "installed", "plain_silu"]


class PeerLayer(Protocol):
    """One layer in somebody else's layout."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""

    def bind(self, case: Case) -> Call:
        """The call that runs the layer on a case and returns [N, H]; what it needs is allocated here."""


@dataclass(frozen=True)
class Adapter:
    """missing: why a shape cannot be run here; None if it can. prepare: weights in `format` -> layer."""

    name: str  # as --peers takes it
    format: str
    missing: Callable[[MoeShape], str | None]
    prepare: Callable[[ExpertWeights, MoeShape], PeerLayer]


class AdapterContender:
    """The layers of one adapter as a contender of the bench."""

    ours = False

    def __init__(self, adapter: Adapter, layers: Sequence[PeerLayer]) -> None:
        self.name = f"{adapter.name} {adapter.format}"
        self.format = adapter.format
        self._layers = layers

    @property
    def nbytes(self) -> int:
        return self._layers[0].nbytes

    def why_not(self, case: Case) -> str | None:
        return None

    def calls(self, case: Case) -> Sequence[Call]:
        return [layer.bind(case) for layer in self._layers]

    def compile(self, cases: Sequence[Case]) -> None:
        """Where the layer can say in advance what it needs (a `compile` of its own)."""
        if callable(hook := getattr(self._layers[0], "compile", None)):
            hook(cases)

    def facts(self, case: Case) -> dict[str, Any]:
        return {}


def installed(package: str, hint: str) -> str | None:
    """Why a package cannot be imported here; None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed ({hint})"
    return None


def plain_silu(shape: MoeShape) -> str | None:
    """Why an adapter that knows SwiGLU without biases cannot run a shape; None if it can."""
    if shape.activation != "silu" or shape.biases:
        return f"the adapter runs silu without biases, not {shape.activation}" + (
            " with biases" if shape.biases else ""
        )
    return None

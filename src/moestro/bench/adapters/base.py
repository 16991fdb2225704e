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

from moestro.bench.contenders import Call, Contender
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = [
    "Adapter",
    "AdapterContender",
    "PeerLayer",
    "first_reason",
    "installed",
    "local_pairs",
    "plain_silu",
    "swiglu_only",
    "whole_peer",
]


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
    package: str = ""  # in tables, where --peers has several names for one package
    input_format: str | None = None  # what it quantises activations to
    part: str | None = None  # what it runs, if not the whole layer; such a one is no peer, but a bound

    @property
    def title(self) -> str:
        """As tables show it: package, format, format of activations."""
        return " ".join(filter(None, [self.package or self.name, self.format, self.input_format, self.part]))


class AdapterContender:
    """The layers of one adapter as a contender of the bench."""

    ours = False

    def __init__(self, adapter: Adapter, layers: Sequence[PeerLayer]) -> None:
        self.name = adapter.title
        self.format = adapter.format
        self.input_format = adapter.input_format
        self.part = adapter.part
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
        return {} if self.part is None else {"part": self.part}


def whole_peer(contender: Contender) -> bool:
    """Whether it is somebody else's whole layer: what ratios are taken against."""
    return not contender.ours and getattr(contender, "part", None) is None


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


def swiglu_only(shape: MoeShape) -> str | None:
    """Why an adapter that knows SwiGLU, gpt-oss's too, with or without biases cannot run a shape; None if it can."""
    if shape.activation not in ("silu", "swiglu_oai"):
        return f"the adapter runs silu and gpt-oss's SwiGLU, not {shape.activation}"
    return None


def local_pairs(shape: MoeShape) -> str | None:
    """Why an adapter that takes no pairs of other ranks cannot run a shape; None if it can."""
    return "the adapter takes no pairs of other ranks" if shape.ep > 1 and not shape.local_pairs else None


def first_reason(*reasons: Callable[[], str | None]) -> str | None:
    """The first reason that there is: what is asked later may stand on what was asked before."""
    return next((reason for ask in reasons if (reason := ask()) is not None), None)

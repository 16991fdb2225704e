"""What is measured against what: the protocol of a contender, and Moestro's own.

A contender is one way to run the layer: Moestro in one format on one backend, or somebody else's code on
the same weights (peers.py; GPU peers register there too). All of them get the same Case and return [N, H].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from moestro.bench.layers import Case

__all__ = ["Call", "Contender"]

Call = Callable[[], torch.Tensor]


class Contender(Protocol):
    """One way to run a layer."""

    @property
    def name(self) -> str:
        """As tables show it, e.g. "moestro nvfp4" or "transformers grouped_mm"."""

    @property
    def ours(self) -> bool:
        """Whether this is Moestro; ratios are taken against the fastest contender of which this is False."""

    @property
    def format(self) -> str:
        """The format of its weights."""

    @property
    def nbytes(self) -> int:
        """Bytes of one layer's weights as this contender holds them."""

    def why_not(self, case: Case) -> str | None:
        """Why it cannot (or should not) run this case; None if it can."""

    def calls(self, case: Case) -> Sequence[Call]:
        """One call per layer; each runs that layer on the case and returns [N, H]."""

    def facts(self, case: Case) -> dict[str, Any]:
        """What the results should say about this case, e.g. the tactic that was chosen."""

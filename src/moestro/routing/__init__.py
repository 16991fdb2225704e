"""Routing: from router logits to experts (route), the distributions that batches are synthesised from, recordings."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from moestro.routing.distributions import (
    Balanced,
    Correlated,
    Dirichlet,
    Distribution,
    Uniform,
    Zipf,
    sample_weights,
)
from moestro.routing.parse import parse
from moestro.routing.recorded import Recorded
from moestro.routing.recorded import record as _write
from moestro.routing.recording import Recording, recording_of, replay
from moestro.routing.router import METHODS, route
from moestro.routing.trained import Trained

__all__ = [
    "METHODS",
    "Balanced",
    "Correlated",
    "Dirichlet",
    "Distribution",
    "Recorded",
    "Recording",
    "Trained",
    "Uniform",
    "Zipf",
    "parse",
    "record",
    "replay",
    "route",
    "sample_weights",
]

if TYPE_CHECKING:
    import torch


@overload
def record(model: torch.nn.Module, /) -> AbstractContextManager[Recording]: ...
@overload
def record(
    path: str | Path,
    ids: torch.Tensor,
    num_experts: int | None = None,
    *,
    weights: torch.Tensor | None = None,
) -> None: ...
def record(path: Any, ids: Any = None, num_experts: int | None = None, *, weights: Any = None) -> Any:
    """Record a model's routing: `with record(model) as recording`; or write ids to a file: `record(path, ids)`.

    See Recording, and Recorded for what reads the file.
    """
    if isinstance(path, str | Path):
        return _write(path, ids, num_experts, weights=weights)
    return recording_of(path)

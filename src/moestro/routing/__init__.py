"""Routing: from router logits to experts (route), and the distributions that batches are synthesised from."""

from __future__ import annotations

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
from moestro.routing.recorded import Recorded, record
from moestro.routing.router import METHODS, route

__all__ = [
    "METHODS",
    "Balanced",
    "Correlated",
    "Dirichlet",
    "Distribution",
    "Recorded",
    "Uniform",
    "Zipf",
    "parse",
    "record",
    "route",
    "sample_weights",
]

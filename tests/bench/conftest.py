"""Small layers for the bench's tests."""

from __future__ import annotations

import pytest

from moestro.bench.models import MoeShape, from_sizes


@pytest.fixture
def tiny() -> MoeShape:
    return from_sizes("8,2,64,32")

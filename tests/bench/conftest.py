"""Small layers for the bench's tests."""

from __future__ import annotations

import functools

import pytest

from moestro.bench.models import MoeShape, from_sizes
from moestro.tuning import AutoTuner, MeasurementPolicy


@pytest.fixture
def tiny() -> MoeShape:
    return from_sizes("8,2,64,32")


@pytest.fixture
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moestro tune` ends every race after a few rounds, however busy the machine is."""
    policy = MeasurementPolicy(max_rounds=4, cold_cache=False, warmup=0)
    monkeypatch.setattr("moestro.bench.tune.AutoTuner", functools.partial(AutoTuner, policy=policy))

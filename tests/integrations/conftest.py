"""Transformers with Moestro registered, for one test at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moestro.tuning import AutoTuner


def _registered(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[None]:
    """register(**options) with a default tuner of its own; Transformers knows nothing of it afterwards."""
    from moestro.integrations import transformers as mt

    monkeypatch.setattr(AutoTuner, "_default", AutoTuner())
    mt.register(**options)
    yield
    mt.REGISTERED.clear()
    mt.ExpertsInterface._global_mapping.pop("moestro", None)  # a test's own, under our name


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every backend that runs here."""
    yield from _registered(monkeypatch)


@pytest.fixture
def registered_portable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The portable backend, which keeps the values of every layout."""
    yield from _registered(monkeypatch, backend="portable")

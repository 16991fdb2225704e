"""Each test has a peer's tuner of its own, in memory, on a clock that the test sets."""

from __future__ import annotations

import pytest
from peer_runners import PaperTimer

from moestro.compat import trtllm
from moestro.compat.flashinfer import autotuner
from moestro.tuning import MeasurementPolicy


@pytest.fixture(params=[autotuner, trtllm], ids=["flashinfer", "trtllm"])
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """Either peer's module, with a fresh AutoTuner.get()."""
    module = request.param
    fresh = module.AutoTuner(timer=PaperTimer(), policy=MeasurementPolicy(verify=False))
    monkeypatch.setattr(module.AutoTuner, "_instance", fresh)
    return module


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> object:
    """moestro.compat.flashinfer.autotuner with a fresh AutoTuner.get()."""
    fresh = autotuner.AutoTuner(timer=PaperTimer(), policy=MeasurementPolicy(verify=False))
    monkeypatch.setattr(autotuner.AutoTuner, "_instance", fresh)
    return autotuner


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> object:
    """moestro.compat.trtllm with a fresh AutoTuner.get()."""
    fresh = trtllm.AutoTuner(timer=PaperTimer(), policy=MeasurementPolicy(verify=False))
    monkeypatch.setattr(trtllm.AutoTuner, "_instance", fresh)
    return trtllm

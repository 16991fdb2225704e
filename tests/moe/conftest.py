"""Every test has a tuner of its own as the default one: the user's store is neither read nor written."""

from __future__ import annotations

import pytest

from moestro.tuning import AutoTuner


@pytest.fixture(autouse=True)
def default_tuner(monkeypatch: pytest.MonkeyPatch) -> AutoTuner:
    tuner = AutoTuner()
    monkeypatch.setattr(AutoTuner, "_default", tuner)
    return tuner

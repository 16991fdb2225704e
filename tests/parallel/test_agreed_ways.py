"""What ranks tell each other of the ways that were decided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moestro.parallel import tuned


class Tuner:
    """Of buckets 1, 4, 16 and 64 only 16 was measured, by a tuning that did not finish."""

    def decision(self, op: str, runners: Any, config: Any, size: int) -> Any:
        near = size == 16
        return SimpleNamespace(
            status="extrapolated" if size > 16 else "measured" if near else "default",
            bucket=16,
            tactic="dispatch" if near else -1,
            stands_in=not near,
        )


def test_sizes_that_nothing_near_was_measured_for_go_the_default_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "way_tuner", lambda ep: Tuner())
    for name in ("WayRunner", "way_config"):
        monkeypatch.setattr(tuned, name, lambda ep: None)
    monkeypatch.setattr(tuned, "way_example", lambda ep, size: size)
    found = tuned._decided(SimpleNamespace(max_num_tokens=64))  # type: ignore[arg-type]
    assert found == [[1, tuned.DEFAULT_WAY], [4, tuned.DEFAULT_WAY], [16, "dispatch"]]

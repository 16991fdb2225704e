"""The CPU backend's tests need the compiled core; CI has a compiler, so its absence there is a failure."""

from __future__ import annotations

import os

import pytest

from moestro.kernels.cpu import core, runner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = core.why_no_core()
    if reason is None or os.environ.get("CI"):
        return
    for item in items:
        if "kernels/cpu" in item.nodeid and "without_a_core" not in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def threads_however_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tests are small, and what they find is to hold for threads, too."""
    monkeypatch.setattr(runner, "WORK_OF_A_THREAD", 1)

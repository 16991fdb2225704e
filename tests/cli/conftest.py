"""The command line on layers small enough for every test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Run
from typer.testing import CliRunner, Result

from moestro.cli import console
from moestro.cli.app import app


class SteadyClock:
    """Runs the call and says that it took a millisecond: races end at once, whatever the machine does."""

    name = "steady"

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            call()
            return 1e-3

        return sample


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `moestro ARGUMENTS` in an empty folder with a store of its own, by a steady clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESTRO_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    for made in (
        console.output,
        console.errors,
    ):  # they read COLUMNS when they were made, for another test perhaps
        monkeypatch.setattr(made, "_width", 200)
    for user in ("moestro.tuning.toolbox", "moestro.bench.timing"):
        monkeypatch.setattr(f"{user}.default_timer", lambda *_, **__: SteadyClock())

    def invoke(*arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["moestro", *arguments])
        return CliRunner().invoke(app, list(arguments))

    return invoke

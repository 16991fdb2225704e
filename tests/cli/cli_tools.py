"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

TINY = ["--sizes", "8,2,64,32", "--device", "cpu"]
QUICK = ["--rounds", "2", "--seconds", "0"]

Run = Callable[..., Result]

"""How the tests run everywhere.

Each test begins with the same seeds, whatever ran before it in its worker.

Without a GPU, Triton's kernels run in its interpreter; that is chosen when they are first imported. Hypothesis
draws the same examples in every run, so that a change is what turns a test red; `pytest
--hypothesis-profile=search` draws new ones.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("search", settings.default)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws do not depend on the tests before: neither on their number nor on how workers share them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

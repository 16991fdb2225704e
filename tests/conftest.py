"""How the tests run everywhere.

Without a GPU, Triton's kernels run in its interpreter; that is chosen when they are first imported. Hypothesis
draws the same examples in every run, so that a change is what turns a test red; `pytest
--hypothesis-profile=search` draws new ones.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("search", settings.default)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""How the tests run everywhere.

Each test begins with the same seeds and the same number of torch's threads, whatever ran before it in its worker.

Without a GPU, Triton's kernels run in its interpreter; that is chosen when they are first imported. Hypothesis
draws the same examples in every run, so that a change is what turns a test red; `pytest
--hypothesis-profile=search` draws new ones.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
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


def _torch_threads() -> tuple[int, int] | None:
    """torch's threads here, and in a thread that starts now; None where torch is not loaded."""
    torch, started = sys.modules.get("torch"), []
    if torch is None:
        return None
    thread = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), started[0]


@pytest.fixture(autouse=True)
def torch_threads_stay() -> Iterator[None]:
    """What sets torch's threads sets them back, also for threads that start later: decisions depend on both."""
    before = _torch_threads()
    yield
    assert before is None or _torch_threads() == before, "left another number of torch's threads behind"


@pytest.fixture
def torch_threads() -> Callable[[], tuple[int, int] | None]:
    """See _torch_threads."""
    return _torch_threads


@pytest.fixture
def set_torch_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_torch_thread(set_torch_threads: Callable[[int], None]) -> None:
    """Threads that wait for each other take what the others need: each of a test's own runs torch alone."""
    set_torch_threads(1)

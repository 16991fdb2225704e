"""Threads that run torch's operations alone, and what they leave behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from moestro.bench.layers import LayerSource
from moestro.bench.models import MoeShape
from moestro.workers import lone_workers

Threads = Callable[[], tuple[int, int]]  # torch's here, and in a thread that starts now


@pytest.fixture(params=(2, 3), autouse=True)
def count(request: pytest.FixtureRequest, set_torch_threads: Callable[[int], None]) -> int:
    set_torch_threads(request.param)
    return int(request.param)


def test_there_are_as_many_workers_as_torch_has_threads_and_each_has_one(count: int) -> None:
    together = threading.Barrier(count, timeout=60)

    def work(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with lone_workers("test") as pool:
        assert list(pool.map(work, range(count))) == [1] * count
        assert torch.get_num_threads() == count


def test_threads_that_start_afterwards_have_as_many_as_before(count: int, torch_threads: Threads) -> None:
    with lone_workers("test") as pool:
        pool.submit(torch.get_num_threads).result()
    assert torch_threads() == (count, count)


def test_they_have_so_after_an_error_too(count: int, torch_threads: Threads) -> None:
    with pytest.raises(ZeroDivisionError), lone_workers("test") as pool:
        pool.submit(lambda: 1 // 0).result()
    assert torch_threads() == (count, count)


def test_making_a_layer_leaves_the_threads_as_they_are(count: int, torch_threads: Threads) -> None:
    """Decisions of a process that made one are known to its later threads: threads are part of an environment."""
    LayerSource(MoeShape("small", 64, 32, 4, 2)).weights("nvfp4")
    assert torch_threads() == (count, count)

"""Threads that run torch's operations alone, and what they leave behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from moestro.bench.layers import LayerSource
from moestro.bench.models import MoeShape
from moestro.workers import lone_workers


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(params=(2, 3), autouse=True)
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


def test_there_are_as_many_workers_as_torch_has_threads_and_each_has_one(count: int) -> None:
    together = threading.Barrier(count, timeout=60)

    def work(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with lone_workers("test") as pool:
        assert list(pool.map(work, range(count))) == [1] * count
        assert torch.get_num_threads() == count


def test_threads_that_start_afterwards_have_as_many_as_before(count: int) -> None:
    with lone_workers("test") as pool:
        pool.submit(torch.get_num_threads).result()
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (count, count)


def test_they_have_so_after_an_error_too(count: int) -> None:
    with pytest.raises(ZeroDivisionError), lone_workers("test") as pool:
        pool.submit(lambda: 1 // 0).result()
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (count, count)


def test_making_a_layer_leaves_the_threads_as_they_are(count: int) -> None:
    """Decisions of a process that made one are known to its later threads: threads are part of an environment."""
    LayerSource(MoeShape("small", 64, 32, 4, 2)).weights("nvfp4")
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (count, count)

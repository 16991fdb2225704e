"""Ranks as threads on one in-process store: a group without processes, for tests by the hundred."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from moestro.tuning.link import StoreLink


def run_ranks(
    size: int, body: Callable[[StoreLink], Any], timeout_s: float = 10.0, wait_s: float = 60.0
) -> list[Any]:
    """body(link) on each rank; what each returns or raises. Fails where one has not ended after wait_s."""
    store = dist.HashStore()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(StoreLink(store, rank, size, timeout_s))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(wait_s)
        assert not thread.is_alive(), f"rank {rank} hangs"
    return results

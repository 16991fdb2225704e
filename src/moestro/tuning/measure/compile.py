"""Compilation before measurement: in parallel, outside timed windows, within the budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["precompile"]

Name = TypeVar("Name")
POLL = 0.05  # seconds between looks at the budget


def precompile(
    jobs: Mapping[Name, Callable[[], object]],
    late: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[Name, Exception]:
    """Run the jobs in threads; what failed, and how. Returns early, with jobs unfinished, when `late`."""
    if not jobs:
        return {}
    pool = ThreadPoolExecutor(max_workers=min(len(jobs), os.cpu_count() or 1), thread_name_prefix="compile")
    pending = {pool.submit(job): name for name, job in jobs.items()}
    failed: dict[Name, Exception] = {}
    open_ = set(pending)
    while open_ and not late():
        finished, open_ = wait(open_, timeout=POLL, return_when=FIRST_COMPLETED)
        for future in finished:
            error = future.exception()
            if isinstance(error, Exception):
                failed[pending[future]] = error
            progress(len(pending) - len(open_), len(pending))
    pool.shutdown(wait=not open_, cancel_futures=True)
    return failed

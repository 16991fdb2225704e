"""Threads in each of which torch's CPU operations run alone, for work that is cut into many small pieces.

torch's own threads within a small operation cost more in waiting than they save. `torch.set_num_threads` counts for
the thread that calls it, and is also what every thread that starts later begins with: a pool that sets it in its
workers leaves a process whose new threads have one, to run layers with, and to be another environment for decisions.
So what was there before is set again once the workers have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["lone_workers"]


@contextlib.contextmanager
def lone_workers(name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of torch.get_num_threads() threads, one of torch's in each. At the end it waits for what was submitted;
    threads that start afterwards have as many as the caller's.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, name, torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)

"""Compilation before measurement: in parallel, outside timed windows, within the budget.

A runner compiles by `compile_jobs(inputs, tactic) -> {key: job}`, where equal keys are one job, whatever tactics and
sizes share it, or by `compile(inputs, tactic)`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, TypeVar

__all__ = ["jobs_of", "precompile", "precompile_for"]

Name = TypeVar("Name")
POLL = 0.05  # seconds between looks at the budget


def jobs_of(runner: Any, inputs: Sequence[Any], tactic: Any, own: Any) -> dict[Any, Callable[[], object]]:
    """What must be compiled for a tactic at these inputs, by key; `own` is the key where the runner gives none."""
    if callable(split := getattr(runner, "compile_jobs", None)):
        return {("shared", type(runner), key): job for key, job in split(inputs, tactic).items()}
    if callable(hook := getattr(runner, "compile", None)):
        return {own: functools.partial(hook, inputs, tactic)}
    return {}


def precompile(
    jobs: Mapping[Name, Callable[[], object]],
    late: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, of: None,
    finished: Callable[[Name], None] = lambda name: None,
) -> dict[Name, Exception]:
    """Run the jobs in threads; what failed, and how. Returns early, with jobs unfinished, when `late`.

    `finished` is told of each job that has ended, well or not.
    """
    if not jobs:
        return {}
    pool = ThreadPoolExecutor(max_workers=min(len(jobs), os.cpu_count() or 1), thread_name_prefix="compile")
    pending = {pool.submit(job): name for name, job in jobs.items()}
    failed: dict[Name, Exception] = {}
    open_ = set(pending)
    while open_ and not late():
        ended, open_ = wait(open_, timeout=POLL, return_when=FIRST_COMPLETED)
        for future in ended:
            finished(pending[future])
            error = future.exception()
            if isinstance(error, Exception):
                failed[pending[future]] = error
            progress(len(pending) - len(open_), len(pending))
    pool.shutdown(wait=not open_, cancel_futures=True)
    return failed


def precompile_for(
    needs: Mapping[Any, Collection[Any]],
    jobs: Mapping[Any, Callable[[], object]],
    compiled: set[Any],
    late: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> dict[Any, Exception]:
    """As `precompile`; candidates all of whose jobs ended well are added to `compiled`. needs: a candidate's jobs."""
    ended: set[Any] = set()
    failed = precompile(jobs, late, progress, ended.add)
    well = ended - failed.keys()
    compiled.update(candidate for candidate, keys in needs.items() if keys and well.issuperset(keys))
    return failed

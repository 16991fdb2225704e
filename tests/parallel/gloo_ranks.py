"""Gloo processes that stay for a whole test module: run(function, *args) calls it on each rank.

A function is called as function(group, *args) on the first `size` processes, with a group of just these.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

SIZES = (2, 4)
TIMEOUT_S = 60
START_S = 280  # four processes that import torch, on a machine that is busy with other things


def _work(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    how = {"timeout": timedelta(seconds=TIMEOUT_S)}
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", timedelta(seconds=START_S), rank=rank, world_size=size
    )
    groups = {n: dist.new_group(list(range(n)), **how) for n in SIZES if n <= size}
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, args, count = job
        try:
            pipe.send((True, function(groups[count], *args)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Ranks:
    """`size` processes."""

    def __init__(self, size: int = 4) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._rendezvous = tempfile.mkstemp()
        os.close(handle)
        os.unlink(self._rendezvous)
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, self._rendezvous, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.poll(START_S), "a rank did not start"
            pipe.recv()

    def run(self, function: Callable[..., Any], *args: Any, size: int = 2, wait_s: float = 250) -> list[Any]:
        """What the function gives on each rank. Fails with the traceback of a rank where it raises."""
        for pipe in self.pipes[:size]:
            pipe.send((function, args, size))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(wait_s), f"rank {rank} hangs"
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            assert fine, f"rank {rank}: {value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()

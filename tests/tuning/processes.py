"""Runs in child processes of test_processes.py: tunes a kernel on paper into a store."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

TIMES = {-1: 1e-3, 0: 5e-4, 1: lambda n: n * 1e-6}


def tune(store: Path, op: str, size: int, pause: float = 0.0) -> None:
    clock = quiet_clock()

    class Slow(Kernel):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
            time.sleep(pause)
            return super().get_valid_tactics(inputs, profile)

    Slow.__qualname__ = "Kernel"
    Slow.__module__ = Kernel.__module__
    t = tuner(clock, store)
    with t.autotune(True, crossover=False):
        t.choose_one(op, [Slow(clock, TIMES)], config(), inputs(size))


class Crashing(Kernel):
    """Tactic 1 kills its process, 2 hangs."""

    def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
        return [0, 1, 2]

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        if tactic == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if tactic == 2:
            time.sleep(1000)
        self._clock.advance({-1: 1e-3, 0: 5e-4}[tactic])


if __name__ == "__main__":
    tune(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))

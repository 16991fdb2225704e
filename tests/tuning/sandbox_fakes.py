"""Runners that misbehave, importable by a child process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from typing import Any

from moestro.tuning import is_in_profile_measurement


class Vandal:
    """The tactic says how: "exit", "segfault", "hang", "raise"; "parent", "scope" and "pool" look around."""

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> None:
        match tactic:
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "raise":
                raise ValueError(f"tile does not fit {inputs[0]}")
            case "parent":
                assert kwargs["parent"] != os.getpid()
            case "scope":
                assert is_in_profile_measurement()
            case "pool":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    assert pool.map(abs, [-2]) == [2]


class Unpicklable(Vandal):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class OnlyHere(Vandal):
    """Unpickles in the process that made it only."""

    def __reduce__(self) -> Any:
        return (_only_in, (os.getpid(),))


def _only_in(pid: int) -> OnlyHere:
    if os.getpid() != pid:
        raise RuntimeError("no such device here")
    return OnlyHere()

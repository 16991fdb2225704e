"""One thread of this process that notices what other processes have tuned since.

Every few seconds it asks each folder that was read when it was changed last, and has the changed ones read
again: a look-up itself never touches the disk. It holds no tuner alive, rests while one measures, and ends
with the last one. A forked child starts its own at its first read.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Protocol
from weakref import WeakSet

from moestro.tuning.store.notices import in_background

__all__ = ["INTERVAL_S", "Watched", "watch"]

INTERVAL_S = 2.0
SHARE = 50  # it sleeps at least so many times as long as it worked


class Watched(Protocol):
    """Whose folders are looked after."""

    busy: int

    def look_for_changes(self) -> None: ...


_all: WeakSet[Watched] = WeakSet()
_lock = threading.Lock()  # of what follows
_owner = 0  # the process whose thread it is
_pass = threading.Lock()  # held while folders are looked at, and over a fork: a child finds no lock taken


def watch(known: Watched) -> None:
    """Look after the folders of one tuner as long as it lives."""
    _all.add(known)


def awake() -> None:
    """Have a thread in this process; called when a folder has been read."""
    global _owner
    if _owner == os.getpid():
        return
    with _lock:
        if _owner != os.getpid():
            _owner = os.getpid()
            threading.Thread(target=_run, name="moestro-store-watch", daemon=True).start()


def _look(known: Watched) -> None:
    try:
        known.look_for_changes()
    except Exception as error:  # the thread must go on; warnings may be errors here
        logging.getLogger("moestro.tuning").warning("what changed in a store could not be read: %s", error)


def _after_fork() -> None:
    global _lock, _owner, _pass
    _lock, _pass, _owner = threading.Lock(), threading.Lock(), 0


os.register_at_fork(
    before=lambda: _pass.acquire(), after_in_parent=lambda: _pass.release(), after_in_child=_after_fork
)


def _run() -> None:
    global _owner
    rest = INTERVAL_S
    while True:
        time.sleep(rest)
        started = time.perf_counter()
        with _pass, in_background():
            for known in list(_all):
                if not known.busy:
                    _look(known)
        rest = max(INTERVAL_S, SHARE * (time.perf_counter() - started))
        with _lock:
            if not len(_all):
                _owner = 0
                return

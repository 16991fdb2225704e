"""How the ranks of a group talk while they tune.

An exchange is one small JSON value of every rank, over the group's c10d store (the TCPStore of torchrun), not
over NCCL or gloo: it leaves the device alone while it is measured, it has a time-out of its own, and it can
say who is missing. It ends with one atomic verdict, so that either all ranks go on or all give up: a rank that
comes after the others gave up reads their verdict instead of going on alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from moestro.errors import GroupError, TuningError

__all__ = ["DEFAULT_TIMEOUT_S", "Link", "StoreLink", "link_of"]

DEFAULT_TIMEOUT_S = 300.0  # where a group has no time-out of its own
ALL_HERE = "all here"
GRACE_S = 5.0  # beyond the time-out: for the store to answer at all
PAUSES = (0.0, 20e-6, 100e-6, 500e-6, 2e-3, 5e-3)  # between looks for the others; the last again and again
_made: Counter[str] = Counter()  # links of each process group so far: their keys must not meet


@runtime_checkable
class Link(Protocol):
    """How the ranks of a group talk. Values are JSON."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, step: str, value: Any) -> list[Any]:
        """Every rank's value, in order of rank. Raises GroupError on all ranks unless all came in time, to
        this step."""

    def leave(self, why: str) -> None:
        """Tell the others not to wait for this rank."""


class StoreLink:
    """A Link over a c10d store. Calls of exchange are numbered, so that all ranks' n-th calls meet."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        if not timeout_s > 0:
            raise TuningError(f"the time-out of a group must be seconds > 0, got {timeout_s!r}")
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.broken = ""
        self._store, self._count = store, 0
        self._worker = _Worker()

    def exchange(self, step: str, value: Any) -> list[Any]:
        if self.broken:
            raise GroupError(self.broken)
        number, self._count = self._count, self._count + 1
        try:
            return list(
                self._worker.run(lambda: self._exchange(number, step, value), self.timeout_s + GRACE_S)
            )
        except GroupError as error:
            self._break(str(error))
            raise
        except Exception as error:  # whatever a store raises whose host is gone
            self._break(f"the group's store does not answer at {step!r}: {type(error).__name__}: {error}")
            raise GroupError(self.broken) from error

    def _exchange(self, number: int, step: str, value: Any) -> list[Any]:
        self._store.set(f"{number}/{self.rank}", json.dumps({"step": step, "value": value}))
        keys = [f"{number}/{rank}" for rank in range(self.size)]
        self._wait(number, step, keys)
        said = [json.loads(text) for text in self._store.multi_get(keys)]
        steps = [one["step"] for one in said]
        if len(set(steps)) > 1:
            raise GroupError(f"ranks must make the same calls while they tune, got {dict(enumerate(steps))}")
        if number:  # everyone has set this number, so everyone has read the one before
            self._store.delete_key(f"{number - 1}/{self.rank}")
            if self.rank == 0:
                self._store.delete_key(f"{number - 1}/end")
        return [one["value"] for one in said]

    def _wait(self, number: int, step: str, keys: list[str]) -> None:
        """Until all keys are there; GroupError if the ranks gave up, which all of them then do."""
        end = time.monotonic() + self.timeout_s
        pauses = itertools.chain(PAUSES, itertools.repeat(PAUSES[-1]))
        verdict = ""
        while not verdict:
            if self._store.check(keys):
                verdict = self._verdict(number, ALL_HERE)
            elif self._store.check(["broken"]):
                verdict = self._verdict(number, self._store.get("broken").decode())
            elif time.monotonic() > end:
                verdict = self._verdict(number, self._late(step, keys))
            else:
                time.sleep(next(pauses))
        if verdict != ALL_HERE:
            raise GroupError(verdict)

    def _verdict(self, number: int, mine: str) -> str:
        """The first rank's verdict on an exchange is everybody's."""
        got = self._store.compare_set(f"{number}/end", "", mine)
        return str(got.decode() if isinstance(got, bytes) else got)

    def _late(self, step: str, keys: Sequence[str]) -> str:
        missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        who = f"rank{'s' * (len(missing) != 1)} {', '.join(map(str, missing))} of {self.size}"
        return (
            f"{who} did not come to {step!r} within {self.timeout_s:g} s: dead, or slower than the time-out"
        )

    def leave(self, why: str) -> None:
        if not self.broken:
            self._break(f"rank {self.rank} left: {why}")

    # --- signs of life, for work between exchanges ------------------------------------------------------
    def pulse(self, count: int) -> bool:
        """Say that this rank lives; False if the store does not take it."""
        try:
            self._store.set(f"pulse/{self.rank}", str(count))
        except Exception:
            return False
        return True

    def read_pulses(self) -> list[str]:
        """What each rank said last; "" where nothing was heard, or the store is gone."""
        try:
            return list(self._worker.run(self._read_pulses, GRACE_S))
        except TimeoutError:
            return [""] * self.size

    def _read_pulses(self) -> list[str]:
        found = []
        for rank in range(self.size):
            key = f"pulse/{rank}"
            try:
                found.append(self._store.get(key).decode() if self._store.check([key]) else "")
            except Exception:
                found.append("")
        return found

    def reason(self) -> str:
        """Why the group is broken, by the first rank's word; "" if it is not."""

        def read() -> str:
            return str(self._store.get("broken").decode()) if self._store.check(["broken"]) else ""

        try:
            return str(self._worker.run(read, GRACE_S))
        except Exception as error:
            return (
                f"the group's store does not answer ({type(error).__name__}): its host, rank 0, may be gone"
            )

    def _break(self, why: str) -> None:
        self.broken = why
        with contextlib.suppress(Exception):  # the store is gone: the others run into their time-out
            self._worker.run(lambda: self._store.compare_set("broken", "", why), GRACE_S)


class _Worker:
    """Runs operations of a store, which have no time-out where its host does not answer, in a thread that may be
    left behind."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="moestro-link")
        thread.start()
        # Also at the process's end: a thread that is inside the store when Python goes away aborts the process.
        weakref.finalize(self, _end, self._jobs, thread)

    def run(self, job: Callable[[], Any], seconds: float) -> Any:
        """What the job gives or raises; TimeoutError after so many seconds."""
        done = threading.Event()
        box: list[tuple[bool, Any]] = []
        self._jobs.put((job, box, done))
        if not done.wait(seconds):
            raise TimeoutError(f"no answer within {seconds:g} s")
        fine, value = box[0]
        if not fine:
            raise value
        return value


def _end(jobs: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(1.0)


def _work(jobs: queue.SimpleQueue[Any]) -> None:
    while (next_one := jobs.get()) is not None:
        job, box, done = next_one
        try:
            box.append((True, job()))
        except BaseException as error:
            box.append((False, error))
        done.set()
        del next_one, job, box, done  # a job holds its link, whose end is what ends this thread


def link_of(group: Any, timeout_s: float | None) -> StoreLink:
    """The link of a torch.distributed.ProcessGroup. TuningError for anything else."""
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TuningError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_process_group_store(group)
    with contextlib.suppress(Exception):  # not every store has one
        store = store.clone()  # a connection of its own: who waits on a shared one holds up everybody
    name = str(getattr(group, "group_name", "group"))
    _made[name] += 1
    prefixed = distributed_c10d.PrefixStore(f"moestro/{name}/{_made[name]}", store)
    return StoreLink(prefixed, group.rank(), group.size(), timeout_s or _timeout_of(group))


def _timeout_of(group: Any) -> float:
    """The group's own time-out, in seconds."""
    import torch

    for device in ("cpu", "cuda"):
        try:
            found = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        if isinstance(found, timedelta) and found.total_seconds() > 0:
            return found.total_seconds()
    return DEFAULT_TIMEOUT_S

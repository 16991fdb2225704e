"""The ranks of a process group, as expert parallelism uses them: collectives on padded rows, and who is gone.

Collectives are torch.distributed's, as bytes, so that gloo and NCCL take every dtype. One that fails (a peer
died, the group's time-out ended) becomes a GroupError that names the ranks without a pulse: every rank has a
thread that counts up one key of the group's store a second.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moestro.errors import GroupError
from moestro.tuning.link import GRACE_S, StoreLink, link_of

__all__ = ["Peers"]

BEAT_S = 1.0
# torch 2.13 has new names for the two and warns of the old.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
LOOK_S = 1.0  # between looks whether another rank has left, while a collective waits for it
LET_GO_S, LET_GO_PAUSE_S = 1.0, 20e-6
LISTEN_S = 2.5  # a rank whose count stands still for so long is gone


class Peers:
    """Rank, size and collectives of a group (None: all ranks). timeout_s: for agreements; the group's own by
    default."""

    def __init__(self, group: Any, timeout_s: float | None = None) -> None:
        group = dist.group.WORLD if group is None else group
        self.link: StoreLink = link_of(group, timeout_s)
        self.group = group
        self.rank, self.size = self.link.rank, self.link.size
        self._pulse = _Pulse(self.link)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Every rank's rows [B, ...], in order of rank: [R * B, ...]. B is the same on all ranks."""
        out = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        self._do("all-gather", _all_gather, _bytes(out), _bytes(rows))
        return out

    def reduce_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of each rank's block of rows [R * B, ...]: [B, ...].

        NCCL adds in the rows' dtype. Elsewhere every rank gets the parts and adds them in float32.
        """
        block = rows.shape[0] // self.size
        if rows.is_cuda:
            out = rows.new_empty((block, *rows.shape[1:]))
            self._do("reduce-scatter", _reduce_scatter, out, rows)
            return out
        parts = self.all_to_all(rows).view(self.size, block, *rows.shape[1:])
        return parts.float().sum(0).to(rows.dtype)

    def all_to_all(
        self, rows: torch.Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> torch.Tensor:
        """rows [ΣB, ...] to the ranks, send[r] of them to rank r; receive[r] rows come from it. Equal parts
        without the two."""
        count = rows.shape[0] if receive is None else sum(receive)
        out = rows.new_empty((count, *rows.shape[1:]))
        width = rows[0].nbytes if rows.shape[0] else out[0].nbytes if count else 0
        received, sent = ([n * width for n in part] if part is not None else None for part in (receive, send))
        self._do("all-to-all", dist.all_to_all_single, _bytes(out), _bytes(rows), received, sent)
        return out

    def numbers(self, mine: int, device: torch.device) -> list[int]:
        """One number of each rank; waits for the device."""
        return [int(n) for n in self.all_gather(torch.tensor([mine], device=device)).tolist()]

    def exchange_numbers(self, mine: torch.Tensor) -> list[int]:
        """mine[r] goes to rank r; what came from each."""
        return [int(n) for n in self.all_to_all(mine).tolist()]

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank will not take part any more."""
        self.link.leave(f"{type(error).__name__}: {error}")

    def _do(
        self, what: str, collective: Callable[..., Any], out: torch.Tensor, rows: torch.Tensor, *sizes: Any
    ) -> None:
        """collective(out, rows, *sizes) over the group."""
        if self.link.broken:
            raise GroupError(self.link.broken)
        try:
            work = collective(out, rows, *sizes, group=self.group, async_op=not rows.is_cuda)
            if work is not None:
                self._finish(work)
                del work
                _let_go(out, rows)
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            for tensor in (out, rows):
                _never_free(tensor)
            why = f"{what} failed: {self._pulse.diagnosis()} ({str(error).splitlines()[0][:200]})"
            self.link.leave(why)
            raise GroupError(why) from error

    def _finish(self, work: Any) -> None:
        """Wait for a gloo collective, but not for a rank that has said that it will not come. Raises
        RuntimeError."""
        end = time.monotonic() + self.link.timeout_s + GRACE_S  # gloo's own time-out comes before
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError:
                if work.is_completed() or time.monotonic() > end or self.link.reason():
                    raise


class _Pulse:
    """One key of each rank that counts up while its process lives."""

    def __init__(self, link: StoreLink) -> None:
        self._link = link
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(link, stop), daemon=True, name="moestro-pulse")
        thread.start()
        # Also at the process's end: a thread that is inside the store when Python goes away aborts the process.
        weakref.finalize(self, _end, stop, thread)

    def diagnosis(self) -> str:
        """Which ranks are gone."""
        reason = self._link.reason()
        if reason:
            return reason
        before = self._link.read_pulses()
        time.sleep(LISTEN_S)
        after = self._link.read_pulses()
        gone = [
            rank
            for rank, (a, b) in enumerate(zip(before, after, strict=True))
            if a == b and rank != self._link.rank
        ]
        if not gone:
            return f"all {self._link.size} ranks are alive: one is stuck, or in another call"
        who = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))} of {self._link.size}"
        return f"{who} gave no sign of life for {LISTEN_S:g} s"


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(1.0)


def _beat(link: StoreLink, stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1
        if not link.pulse(count):
            return
        stop.wait(BEAT_S)


def _let_go(*tensors: torch.Tensor) -> None:
    """Wait until gloo's thread has let these go, which it does just after it says that it is done.

    Who lets go last frees the Python object. gloo's thread needs Python's lock for that, and where it asks for it while the
    interpreter shuts down it aborts the process (torch 2.13: "terminate called without an active exception").
    """
    end = time.monotonic() + LET_GO_S
    while any(tensor._use_count() > 1 for tensor in tensors):  # type: ignore[attr-defined]
        if time.monotonic() > end:
            for tensor in tensors:
                _never_free(tensor)
            return
        time.sleep(LET_GO_PAUSE_S)


def _never_free(tensor: torch.Tensor) -> None:
    """Of a collective that did not end: gloo's thread may hold its rows for as long as the process lives."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(-1).view(torch.uint8)

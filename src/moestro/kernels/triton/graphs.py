"""A replayed call whose addresses came before is one launch of a CUDA graph.

In an eager decode loop the caching allocator hands out the same memory step after step: x, ids, weights, out and the
scratch of a layer lie where they lay. From the third call at the same addresses, on the same stream, the launches are
captured once (on a stream of our own, which nobody else uses) and from then on launched as a whole: 3 to 5 µs of host
time on a machine where three launches take 22 to 28. Nothing of the graph can be stale: it holds what the addresses
and the plan say, and both are looked at before (Replay.ready).

The driver is called through ctypes with the interpreter's lock held, since a graph that can be launched is not to be
touched by two threads at a time. Whatever the driver refuses, and a launch that cannot be captured, ends this for the
process, with one log line, and the call is launched as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

from moestro.errors import BackendError
from moestro.kernels.triton.c_library import CLibrary, relaxed
from moestro.tuning.forks import Lock

log = logging.getLogger("moestro")
AFTER = 3  # calls at the same addresses
KEPT = 8  # graphs of a plan: none is let go for another, which a second thread might be about to launch
MOST = 1024  # of a process, some 50 KB each
SEEN = 256  # sets of addresses that are counted
NON_BLOCKING, THREAD_LOCAL = 1, 1  # of CUDA's driver interface
FUNCTIONS = {  # of libcuda, and the types of what they take
    "cuStreamCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuThreadExchangeStreamCaptureMode": (ctypes.c_void_p,),
    "cuStreamBeginCapture_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuStreamEndCapture": (ctypes.c_void_p, ctypes.c_void_p),
    "cuGraphInstantiateWithFlags": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong),
    "cuGraphDestroy": (ctypes.c_void_p,),
    "cuGraphExecDestroy": (ctypes.c_void_p,),
    "cuGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
}

Launches = Callable[..., None]  # launches(stream, *addresses, counters)


class Driver:
    """The part of CUDA's driver that captures and launches graphs. Raises BackendError where it refuses."""

    def __init__(self, library: Any) -> None:
        self._library = CLibrary(library, FUNCTIONS)
        self._launch = self._library.functions["cuGraphLaunch"]
        self._streams: dict[int, int] = {}  # to capture on, by device
        self._capturing = Lock()

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        if status := self._launch(graph, stream):
            raise self._library.refused("cuGraphLaunch", status)

    def capture(self, device: int, launch: Callable[[int], None]) -> int:
        """What launch(stream) launches, as a graph; on `device`, which is the current one."""
        # what is made here does not disturb what other threads capture
        with self._capturing, relaxed(self._library):
            return self._captured(device, launch)

    def _captured(self, device: int, launch: Callable[[int], None]) -> int:
        stream = self._streams.get(device)
        if stream is None:
            made = ctypes.c_void_p()
            self._library.call("cuStreamCreate", ctypes.byref(made), NON_BLOCKING)
            stream = self._streams[device] = made.value or 0
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        failure: Exception | None = None
        self._library.call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
        try:
            launch(stream)
        except Exception as error:  # perhaps only here: what may be launched may not always be captured
            failure = error
        finally:
            self._library.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            if failure is not None:
                raise BackendError(f"a launch cannot be captured: {failure}") from failure
            self._library.call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, 0)
        finally:
            if graph.value:
                self._library.call("cuGraphDestroy", graph)
        return ready.value or 0

    def free(self, graph: int) -> None:
        """Let go of a graph; one that still runs ends first."""
        self._library.call("cuGraphExecDestroy", graph)


@functools.cache
def driver() -> Driver | None:
    """CUDA's driver; None where it is not there, or has no graphs."""
    try:
        return Driver(ctypes.PyDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        log.info("launches are replayed one by one: %s", error)
        return None


class Graphs:
    """The graphs of one plan, by stream and addresses."""

    broken = False  # of all plans: the driver has refused once
    alive = 0  # of all plans

    def __init__(self, driver: Driver, device: int, launches: Launches) -> None:
        self._driver, self._device, self._launches = driver, device, launches
        self._seen: dict[tuple[int, ...], int] = {}
        self._made: dict[tuple[int, ...], int] = {}

    def launch(self, stream: int, *addresses: int) -> bool:
        """Whether the call was launched as a graph."""
        key = (stream, *addresses)
        graph = self._made.get(key)
        try:
            if graph is None:
                graph = self._captured(key)
            if graph is None:
                return False
            self._driver.launch(graph, stream)
        except BackendError as error:
            Graphs.broken = True
            log.warning("launches are replayed one by one from now on: %s", error)
            return False
        return True

    def _captured(self, key: tuple[int, ...]) -> int | None:
        """A graph of the call at these addresses, once they have come often enough."""
        if len(self._made) >= KEPT or Graphs.alive >= MOST:
            return None
        if len(self._seen) >= SEEN:
            self._seen.clear()
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if count < AFTER:
            return None
        made = self._driver.capture(self._device, lambda stream: self._launches(stream, *key[1:]))
        other = self._made.setdefault(key, made)
        if other != made:  # of another thread, meanwhile
            self._driver.free(made)
        else:
            Graphs.alive += 1
        return other

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end there may be no driver any more
            for graph in self._made.values():
                Graphs.alive -= 1
                self._driver.free(graph)

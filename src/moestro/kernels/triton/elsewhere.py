"""Kernels compiled in other processes: MOESTRO_COMPILE_PROCESSES=N, of use where a tuning compiles many.

Triton holds Python's lock for about a second of a kernel's two to five, so threads compile one a second together, however
many processors there are. Here each thread that wants a kernel hands its launch to a process and waits; what that
compiles goes to Triton's cache on disk, where the thread then finds it. Tensors travel as dtype and alignment, all that
Triton specialises on, and a process needs no GPU: it is told the target. One that has had nothing to do for IDLE_S
seconds ends. What goes wrong elsewhere is compiled here, with the error that belongs to it; where the cache does not
give back what was put there, that is said once, and nothing is sent any more. Kernels in CUDA C++ are compiled here: NVRTC
does not hold Python's lock.
"""

from __future__ import annotations

import importlib
import io
import logging
import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moestro.errors import BackendError
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.cuda import CudaKernel
from moestro.kernels.triton.device.common import INTERPRETED

log = logging.getLogger("moestro")
VARIABLE = "MOESTRO_COMPILE_PROCESSES"
IDLE_S = 60.0
ENOUGH_S = 0.5  # a kernel that takes longer elsewhere must be found in the cache in half the time
DONE = b"done"


def processes() -> int:
    """How many processes MOESTRO_COMPILE_PROCESSES asks for; 0 for none. Raises BackendError for anything else."""
    text = os.environ.get(VARIABLE) or "0"
    if not text.isdecimal():
        raise BackendError(f"{VARIABLE} must be a number of processes, got {text!r}")
    return 0 if INTERPRETED else int(text)


def compiled(launch: Launch) -> Any:
    """The compiled kernel of a launch, by another process where some are asked for and it is a Triton kernel."""
    number = 0 if isinstance(launch.kernel, CudaKernel) else processes()
    farm = _farm_of(number, triton.runtime.driver.active.get_current_target()) if number else None
    if farm is None or farm.useless or launch.key in farm.compiled:
        return launch.compile()
    began = time.perf_counter()
    done = farm.compile(launch)
    between = time.perf_counter()
    kernel = launch.compile()
    there, here = between - began, time.perf_counter() - between
    farm.compiled.add(launch.key)
    if done and there > ENOUGH_S and here > there / 2:
        farm.give_up(launch.kernel.__name__, there, here)
    return kernel


class Farm:
    """At most `number` processes, started as they are wanted; for any number of threads."""

    def __init__(self, number: int, target: GPUTarget) -> None:
        self.useless = False
        self.compiled: set[Any] = set()  # keys of launches whose kernels this process has
        self._target, self._room = target, threading.Semaphore(number)
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()

    def compile(self, launch: Launch) -> bool:
        """Whether a process has compiled it."""
        with self._room:
            process = None
            try:
                message = dumps(launch)
                process = self._taken()
                answer = process.ask(message)
            except (
                Exception
            ) as error:  # none starts, or it was idle for too long or is gone: the caller compiles
                log.debug("a process that compiles has ended: %r", error)
                if process is not None:
                    process.close()
                return False
            self._idle.put(process)
            return answer == DONE

    def _taken(self) -> _Process:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Process(self._target)

    def give_up(self, name: str, there: float, here: float) -> None:
        if not self.useless:
            self.useless = True
            log.warning(
                "%s=%s is of no use: %s took %.1f s in another process, and %.1f s more here, where it should be in "
                "Triton's cache; kernels are compiled in this process",
                VARIABLE, os.environ.get(VARIABLE), name, there, here,
            )  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the processes that have nothing to do."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return


_farms: dict[tuple[Any, ...], Farm] = {}


def _farm_of(number: int, target: GPUTarget) -> Farm:
    """The one for so many processes and this target; a forked child has its own, as pipes cannot be shared."""
    return _farms.setdefault((number, target, os.getpid()), Farm(number, target))


class _Process:
    """A child that answers one message after another."""

    def __init__(self, target: GPUTarget) -> None:
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **paths},
            )
        self._pipe.send((target.backend, target.arch, target.warp_size))

    def ask(self, message: bytes) -> bytes:
        self._pipe.send_bytes(message)
        return self._pipe.recv_bytes()

    def close(self) -> None:
        self._pipe.close()
        self._child.kill()
        self._child.wait()


# --- what travels -------------------------------------------------------------------------------------------
class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return "tensor", value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, JITFunction):
            return "kernel", value.fn.__module__, value.fn.__qualname__
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, said: Any) -> Any:
        kind, one, other = said
        if kind == "kernel":
            return getattr(importlib.import_module(one), other)
        return torch.empty(32, dtype=one) if other else torch.empty(32, dtype=one)[1:]


def dumps(launch: Launch) -> bytes:
    """A launch, its tensors as dtype and alignment."""
    out = io.BytesIO()
    _Pickler(out).dump(launch)
    return out.getvalue()


def loads(message: bytes) -> Launch:
    launch: Launch = _Unpickler(io.BytesIO(message)).load()
    return launch


# --- the process that compiles ------------------------------------------------------------------------------
class _Absent:
    """What Triton asks of a driver to compile for a GPU that this process does not touch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def serve(fileno: int) -> None:
    """Answer launches on a connection until it ends, or nothing came for IDLE_S seconds."""
    pipe = Connection(fileno)
    triton.runtime.driver.set_active(_Absent(GPUTarget(*pipe.recv())))
    while pipe.poll(IDLE_S):
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            loads(message).compile()
            answer = DONE
        except Exception as error:
            answer = repr(error).encode()
        pipe.send_bytes(answer)

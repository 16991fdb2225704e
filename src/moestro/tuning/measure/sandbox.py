"""Tries candidates in a child process, which may crash, hang or poison its CUDA context; then it is replaced.

    with Sandbox(time_limit=30) as box:
        box.load(runner, inputs, kwargs)
        why = box.check(tactic)         # None: it ran. Else the reason, in words

The child is spawned, not forked: a fork of a process with CUDA or threads is not usable. So the runner, the
inputs and the keyword arguments travel by pickle, once per load (again after the child was replaced), and a
runner's class must be importable: defined in a module, or in a script whose work stands under
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.measure.scope import measurement

__all__ = ["Sandbox"]

START_LIMIT = 180.0  # seconds to spawn, import and unpickle: torch, a CUDA context, gigabytes of weights


class Sandbox:
    """One child at a time; not for several threads."""

    def __init__(self, time_limit: float = 30.0) -> None:
        self.time_limit = time_limit
        self._payload: bytes | None = None
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, runner: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """What check() runs from now on. Raises TuningError if it cannot be pickled."""
        try:
            self._payload = pickle.dumps(("load", runner, inputs, dict(kwargs or {})))
        except Exception as error:
            raise TuningError(
                f"isolate=True: runner {type(runner).__name__} or its inputs cannot be sent to a child "
                f"process: {type(error).__name__}: {error}"
            ) from error
        if self._child is not None:
            self._send_payload()

    def check(self, tactic: Any) -> str | None:
        """Run the tactic once in the child: None if it returned within the time limit, else why it did not.

        Raises TuningError if nothing is loaded, or the child cannot be brought up to run anything.
        """
        if self._payload is None:
            raise TuningError("Sandbox.check: nothing is loaded; call load(runner, inputs) first")
        if self._child is None:
            self._start()
        answer = self._ask(pickle.dumps(("run", tactic)), self.time_limit)
        if answer == ("ok", False):
            return None
        why, poisoned = answer
        if poisoned:
            self.close()
        return why

    def close(self) -> None:
        """End the child."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()
            self._child.join()
        self._child = self._pipe = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs,), daemon=True, name="moestro-sandbox")
        self._child.start()
        theirs.close()
        self._send_payload()

    def _send_payload(self) -> None:
        assert self._payload is not None
        why, _ = self._ask(self._payload, START_LIMIT)
        if why != "ok":
            self.close()
            raise TuningError(f"isolate=True: the child process could not load the runner: {why}")

    def _ask(self, message: bytes, limit: float) -> tuple[str, bool]:
        """(the child's answer, whether it is of no more use)."""
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(message)
            if not self._pipe.poll(limit):
                return f"hangs: no answer in {limit:g} s", True
            why, poisoned = self._pipe.recv()
            return str(why), bool(poisoned)
        except (EOFError, OSError):  # the child is gone
            return self._obituary(), True

    def _obituary(self) -> str:
        assert self._child is not None
        self._child.join(5)
        status = self._child.exitcode
        if status is None:
            return "crashed: its process closed the connection"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"crashed: its process was killed by {signal.Signals(-status).name}"
        return f"crashed: its process exited with status {status}"


def _serve(pipe: Connection) -> None:
    """The child: answers ("load", runner, inputs, kwargs) and ("run", tactic): (why or "ok", poisoned)."""
    multiprocessing.current_process().daemon = (
        False  # or candidates that compile in a process pool would fail
    )
    runner: Any = None
    inputs: Sequence[Any] = ()
    kwargs: dict[str, Any] = {}
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):  # the parent closed the pipe, or is gone
            return
        try:
            match pickle.loads(message):
                case ("load", runner, inputs, kwargs):
                    pass
                case ("run", tactic):
                    with measurement():
                        runner.forward(inputs, tactic=tactic, **kwargs)
                        _synchronise()
            answer = ("ok", False)
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", _uses_cuda())
        pipe.send(answer)


def _uses_cuda() -> bool:
    """After an error the CUDA context of a process may be unusable, and says so only later."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _synchronise() -> None:
    if _uses_cuda():
        sys.modules["torch"].cuda.synchronize()

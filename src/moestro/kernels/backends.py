"""The backends by name, imported when first asked for; one that cannot be is unavailable, with a reason.

The order is the order of preference of backend="auto": until something is tuned, the first that can run a
problem runs it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import cast

from moestro.errors import BackendError, unknown_name
from moestro.kernels.problem import MoeProblem, MoeRunner

AUTO = "auto"
PORTABLE = "portable"
OWN = {"cuda": "triton", "cpu": "cpu"}  # the backend with kernels for a type of device
log = logging.getLogger("moestro")
Loader = Callable[[], type[MoeRunner]]


def _loader(module: str, name: str) -> Loader:
    def load() -> type[MoeRunner]:
        return cast("type[MoeRunner]", getattr(importlib.import_module(module), name))

    return load


BACKENDS: dict[str, Loader] = {
    "triton": _loader("moestro.kernels.triton", "TritonRunner"),
    "cpu": _loader("moestro.kernels.cpu", "CpuRunner"),
    "portable": _loader("moestro.kernels.portable.runner", "PortableRunner"),
}


@functools.cache
def _load(name: str) -> type[MoeRunner] | str:
    """The runner class, or why it cannot be imported."""
    try:
        return BACKENDS[name]()
    except Exception as error:  # whatever a broken optional dependency raises
        return f"it cannot be imported: {type(error).__name__}: {error}"


def load(name: str) -> type[MoeRunner]:
    """A backend's runner class. Raises BackendError for an unknown name or one that cannot be imported."""
    if name not in BACKENDS:
        raise BackendError(unknown_name("backend", name, [AUTO, *BACKENDS]))
    loaded = _load(name)
    if isinstance(loaded, str):
        raise BackendError(f"backend {name!r} is not available: {loaded}")
    return loaded


def why_not(name: str, problem: MoeProblem) -> str | None:
    """Why a backend cannot run a problem on this machine; None if it can.

    Raises BackendError for an unknown name.
    """
    try:
        runner = load(name)
    except BackendError as error:
        if name not in BACKENDS:
            raise
        return str(error).partition("not available: ")[2]
    if not runner.runs_layout(problem.weight_layout):
        return f"it cannot run weights in the layout {problem.weight_layout!r}"
    return runner.why_not(problem)


def able(problem: MoeProblem) -> list[str]:
    """The backends that can run a problem on this machine, the preferred one first."""
    return [name for name in BACKENDS if why_not(name, problem) is None]


def resolve(backend: str, problem: MoeProblem) -> list[type[MoeRunner]]:
    """The runner classes that can run a problem, the preferred one first: all of them, or the one named.

    Of a batch-invariant problem the preferred one alone: backends differ in the order of their sums, and one bucket's
    rows must have another's bits. Raises BackendError for a name that is unknown or cannot, with the reason.
    What is left to the portable backend on a device that has a backend of its own is logged, once a reason.
    """
    if backend == AUTO:
        runners = [load(name) for name in able(problem)]
        own = OWN.get(problem.device)
        if own in BACKENDS and runners and runners[0].backend == PORTABLE:
            inputs = f", {problem.input_format} activations" if problem.input_format else ""
            dtype = str(problem.dtype).removeprefix("torch.")
            what = f"{problem.weight_format} weights, x in {dtype}{inputs} on {problem.device}"
            _say(what, own, why_not(own, problem) or "")
        return runners[:1] if problem.batch_invariant else runners
    reason = why_not(backend, problem) if isinstance(backend, str) else ""
    if reason is None:
        return [load(backend)]
    if not isinstance(backend, str):
        raise BackendError(f"backend must be a name, got {backend!r}")
    raise BackendError(f"backend {backend!r} cannot run this: {reason}")


@functools.cache
def _say(what: str, own: str, reason: str) -> None:
    log.warning(
        "the portable backend runs %s, in PyTorch's own operators; backend %r cannot: %s", what, own, reason
    )

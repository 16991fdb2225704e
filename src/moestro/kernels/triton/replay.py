"""A call's launches, replayed: the compiled kernels called directly, with the addresses that changed put in.

An ordinary launch works out, of every argument, what Triton specialises on, looks the kernel up, and reads addresses
through torch: 40 to 100 µs of Python a launch. Between two calls of one layer, number of tokens and tactic nothing of
this changes but the addresses of x, ids, weights, out, the scratch buffer and the counters of the stream. So the first
call runs as ever and keeps the kernels that it got; `bind` takes its arguments apart and writes a function of those
addresses that calls Triton's own launchers. All else is a constant of it: grids, sizes, weights, descriptors.

What may not be replayed is launched as ever. A Replay says so by None from `ready` (before anything ran): another
device, a workspace that is too small, an address that is not a multiple of 16 (Triton compiles another kernel then),
weights that lie elsewhere now, a profiler's hook, a CUDA graph being captured (host time is nothing there). `bind`
refuses with its reason: an argument that it cannot tell the origin of (two inputs that are one tensor, a tensor made
for this call alone), an unknown Triton. What it made is called once with recorders in the place of launchers, and must
give what the ordinary launches were given, argument by argument.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.errors import BackendError
from moestro.kernels.triton import graphs
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.device.common import INTERPRETED

log = logging.getLogger("moestro")
VARIABLE = "MOESTRO_TRITON_LAUNCH"
WAYS = ("graphs", "replay", "plain")
# run(grid 0, 1, 2, stream, function, packed metadata, launch metadata, enter hook, exit hook, *arguments), pointers as
# integers or objects with data_ptr(): read in the sources of 3.6.0 and 3.7.1.
KNOWN = ("3.6", "3.7")
INPUTS = ("x", "ids", "weights", "out")
ALIGNMENT = 16  # Triton specialises on it


def way() -> str:
    """How calls are launched, as far as MOESTRO_TRITON_LAUNCH says. Raises BackendError for a bad switch."""
    found = os.environ.get(VARIABLE) or WAYS[0]
    if found not in WAYS:
        raise BackendError(f"{VARIABLE} must be {' or '.join(WAYS)}, got {found!r}")
    return found


@functools.cache
def why_plain() -> str | None:
    """Why calls are launched as ever in this process; None if they are replayed. Raises BackendError for a bad switch."""
    if way() == "plain":
        return f"{VARIABLE}=plain"
    if INTERPRETED:
        return "kernels are interpreted"
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN:
        log.warning(
            "calls are not replayed: Triton %s is not one of %s, whose launchers are known; every call is launched "
            "as ever",
            triton.__version__,
            ", ".join(KNOWN),
        )
        return f"Triton {triton.__version__} is not known"
    return None


class Origin(NamedTuple):
    """Where the tensors of a call's arguments come from."""

    inputs: Sequence[Any]  # x, ids, weights, out
    workspace: torch.Tensor
    counters: torch.Tensor  # of the stream
    held: Sequence[torch.Tensor]  # weights, scales, biases
    nbytes: int  # of the workspace that a call needs


class Ready(NamedTuple):
    """A call that may be replayed: what `Replay.run` takes."""

    stream: int
    addresses: tuple[int, ...]  # of INPUTS and the workspace


class Replay:
    """The launches of one layer, number of tokens, tactic and device; immutable, so for any number of threads."""

    def __init__(
        self, launches: Callable[..., None], held: Sequence[torch.Tensor], counts: bool, nbytes: int
    ) -> None:
        active = triton.runtime.driver.active
        self._launches, self._held, self.counts, self._nbytes = launches, tuple(held), counts, nbytes
        self._at = tuple(t.data_ptr() for t in held)
        self._device_now, self._stream_now = active.get_current_device, active.get_current_stream
        # in front of a stubbed driver torch has no CUDA
        self._capturing = _capturing() if torch.cuda.is_available() else _never
        self._device = self._device_now()
        cuda = graphs.driver() if way() == "graphs" and torch.cuda.is_available() else None
        self._graphs = None if cuda is None else graphs.Graphs(cuda, self._device, launches)
        self._knobs = triton.knobs.runtime

    def ready(self, inputs: Sequence[Any], workspace: torch.Tensor) -> Ready | None:
        """What is needed to replay a call; None where it must be launched as ever."""
        x, ids, weights, out = inputs
        at = x.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr(), workspace.data_ptr()
        if (at[0] | at[1] | at[2] | at[3] | at[4]) % ALIGNMENT:
            return None
        if self._device_now() != self._device or workspace.numel() < self._nbytes or hooked(self._knobs):
            return None
        if self._capturing():
            return None
        for tensor, address in zip(self._held, self._at, strict=True):
            if tensor.data_ptr() != address:
                return None
        return Ready(self._stream_now(self._device), at)

    def run(self, ready: Ready, counters: int) -> None:
        """Launch. counters: the address of the stream's."""
        whole = self._graphs
        if whole is None or whole.broken or not whole.launch(ready.stream, *ready.addresses, counters):
            self._launches(ready.stream, *ready.addresses, counters)


def _never() -> bool:
    return False


def _capturing() -> Callable[[], bool]:
    """What says whether a graph is being captured: torch's own function, without its look at CUDA's start."""
    found: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None) or (
        torch.cuda.is_current_stream_capturing
    )
    return found


def hooked(knobs: Any) -> bool:
    """Whether somebody wants to see launches (profilers)."""
    for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def tensors_of(parts: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors of format tensors and tensors, those that hold something."""
    found: list[torch.Tensor] = []
    for part in parts:
        values = [part] if isinstance(part, torch.Tensor) else vars(part).values() if part is not None else ()
        found += [v for v in values if isinstance(v, torch.Tensor) and v.numel()]
    return found


def bind(launches: Sequence[Launch], compiled: Sequence[Any], origin: Origin) -> Replay | str:
    """The replay of launches that ran with these kernels; why there is none, in words."""
    kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in compiled]
    if any(kernel is None for kernel in kernels):
        return "a launch gave no compiled kernel"
    if any(getattr(launch.kernel, "pre_run_hooks", None) for launch in launches):
        return "a kernel has hooks of its own"
    if len({id(tensor) for tensor in origin.inputs}) != len(INPUTS) or len(origin.inputs) != len(INPUTS):
        return f"inputs must be {len(INPUTS)} tensors, got {len(origin.inputs)}, or two that are one"
    if any(tensor.data_ptr() % ALIGNMENT for tensor in (*origin.inputs, origin.workspace)):
        return f"an address is no multiple of {ALIGNMENT}"
    writer = _Writer(origin)
    try:
        arguments = [writer.arguments(launch) for launch in launches]
    except _UnknownOriginError as error:
        return str(error)
    grids = [(*launch.grid, 1, 1)[:3] for launch in launches]
    made = writer.function([(k.run, k.function, k.packed_metadata) for k in kernels], grids, arguments)
    differs = _differs(writer, launches, kernels, grids, arguments, origin)
    return differs or Replay(made, origin.held, writer.counts, origin.nbytes)


class _UnknownOriginError(Exception):
    """An argument that nobody knows the origin of."""


class _Writer:
    """Writes arguments as Python expressions in the addresses of a call."""

    def __init__(self, origin: Origin) -> None:
        self._inputs = {id(tensor): name for tensor, name in zip(origin.inputs, INPUTS, strict=True)}
        self._storages = {_storage(tensor) for tensor in (*origin.inputs, origin.counters)}
        self._workspace, self._counters = origin.workspace, origin.counters
        self._held = {_storage(tensor) for tensor in origin.held}
        self.counts = False  # whether the counters are used
        self.constants: dict[str, Any] = {}

    def arguments(self, launch: Launch) -> str:
        """All arguments of a launch, in the order of the kernel's parameters."""
        given = []
        for i, parameter in enumerate(launch.kernel.params):
            if i < len(launch.args):
                value = launch.args[i]
            elif parameter.name in launch.meta:
                value = launch.meta[parameter.name]
            else:
                value = parameter.default
            constant = i >= len(launch.args)
            given.append(self._constant(value) if constant else self._expression(value))
        return ", ".join(given)

    def function(
        self, kernels: Sequence[tuple[Any, ...]], grids: Sequence[Any], arguments: Sequence[str]
    ) -> Any:
        """launches(stream, x, ids, weights, out, scratch, counters), which calls (run, function, metadata) of each."""
        lines, names = [], dict(self.constants)
        for i, ((run, function, metadata), grid, given) in enumerate(
            zip(kernels, grids, arguments, strict=True)
        ):
            names |= {f"run{i}": run, f"function{i}": function, f"metadata{i}": metadata}
            at = ", ".join(map(str, grid))
            lines.append(f"    run{i}({at}, stream, function{i}, metadata{i}, None, None, None, {given})")
        source = f"def launches(stream, {', '.join(INPUTS)}, scratch, counters):\n" + "\n".join(lines)
        exec(compile(source, "<moestro replay>", "exec"), names)
        return names["launches"]

    def _expression(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._address(value)
        if isinstance(value, TensorDescriptor | GluonDescriptor):
            return f"{self._constant(Described(with_base(value, None)))}({self._address(value.base)})"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._expression(v)}, ' for v in value)})"
        if value is None or type(value) in (int, bool):
            return repr(value)
        raise _UnknownOriginError(f"an argument is a {type(value).__name__}")

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _address(self, tensor: torch.Tensor) -> str:
        if (name := self._inputs.get(id(tensor))) is not None:
            return name
        if tensor is self._counters:
            self.counts = True
            return "counters"
        storage = _storage(tensor)
        if storage == _storage(self._workspace):
            return f"scratch + {tensor.data_ptr() - self._workspace.data_ptr()}"
        if storage in self._held and storage not in self._storages:
            return repr(tensor.data_ptr())  # Replay.ready looks whether it still lies there
        raise _UnknownOriginError(f"a tensor {list(tensor.shape)} is none of the call's")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _At:
    """Stands for a tensor at an address."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Described:
    """Tensor descriptors like `template`, by the address that they describe; the last one is kept: a call's scratch
    memory mostly lies where the last call's did.
    """

    __slots__ = ("_last", "_template")

    def __init__(self, template: Any) -> None:
        self._template = template
        self._last: tuple[int, Any] = (-1, None)

    def __call__(self, address: int) -> Any:
        known, made = self._last  # read and written at once: threads may share this
        if known != address:
            made = with_base(self._template, _At(address))
            self._last = address, made
        return made


def with_base(descriptor: Any, base: Any) -> Any:
    """The descriptor of other memory: one that is kept must not keep a call's scratch alive."""
    made = copy.copy(descriptor)
    object.__setattr__(made, "base", base)
    return made


# --- the check of what was made ----------------------------------------------------------------------------
def plain(value: Any) -> Any:
    """An argument as a launcher reads it: addresses as integers, groups as tuples."""
    if isinstance(value, TensorDescriptor | GluonDescriptor):
        return (
            "descriptor",
            value.base.data_ptr(),
            *(repr(v) for k, v in sorted(vars(value).items()) if k != "base"),
        )
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def ordinary(launch: Launch) -> tuple[Any, ...]:
    """What JITFunction.run hands to the launcher: positional arguments, keywords, defaults, as `plain` has them."""
    names = [parameter.name for parameter in launch.kernel.params]
    named = dict(zip(names, launch.args, strict=False)) | {k: v for k, v in launch.meta.items() if k in names}
    return tuple(plain(named.get(p.name, p.default)) for p in launch.kernel.params)


def _differs(
    writer: _Writer,
    launches: Sequence[Launch],
    kernels: Sequence[Any],
    grids: Sequence[Any],
    arguments: Sequence[str],
    origin: Origin,
) -> str | None:
    """What the function would launch otherwise than it was launched; None if nothing."""
    seen: list[tuple[Any, ...]] = []
    recorders = [(lambda *a: seen.append(a), i, kernel.packed_metadata) for i, kernel in enumerate(kernels)]
    at = [tensor.data_ptr() for tensor in (*origin.inputs, origin.workspace, origin.counters)]
    writer.function(recorders, grids, arguments)(0, *at)
    for i, (launch, got) in enumerate(zip(launches, seen, strict=True)):
        if got[:3] != grids[i] or got[4] != i or tuple(map(plain, got[9:])) != ordinary(launch):
            return f"launch {i} ({launch.kernel.__name__}) would not be the same"
    return None

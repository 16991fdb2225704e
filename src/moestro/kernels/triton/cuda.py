"""CudaKernel: a kernel in CUDA C++ with the face of a Triton kernel, so that call, replay and graphs take it for one.

Its constants choose a variant: source text, which NVRTC compiles once (nvrtc.py). Its arguments are
    extern "C" __global__ void NAME(const __grid_constant__ Params p, const __grid_constant__ Map map...)
where Params has a 64-bit word for each argument in order: a tensor's address, an integer, 0 for None; groups (tuples)
count part by part. Map (alignas(64), 128 bytes) is a CUtensorMap, one for each tensor descriptor in order, wherever
among the arguments it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.errors import BackendError
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.cuda_driver import Shape, driver
from moestro.kernels.triton.nvrtc import Cubin
from moestro.tuning.forks import Lock

DESCRIPTORS = (GluonDescriptor, TensorDescriptor)
# of a launch; all else chooses the variant
OPTIONS = {"PDL", "launch_pdl", "num_warps", "num_stages", "maxnreg"}


class Variant(NamedTuple):
    """What a kernel's constants come to."""

    source: str
    threads: int  # of a block
    shared_bytes: int  # dynamic ones of a block
    cluster: int = 1  # blocks of a cluster, which the source says to the GPU; here for who runs it elsewhere


class Parameter(NamedTuple):
    """What call.Launch and replay ask of a kernel's parameter."""

    name: str
    default: None = None
    do_not_specialize: bool = True


class CudaKernel:
    """kernel[grid](*args, HOW=..., launch_pdl=...): one argument for each of `params`, and the constants by name.

    variant(**constants) gives the source, which defines `name`. Every thread may call all of it.
    """

    def __init__(self, name: str, params: Sequence[str], variant: Callable[..., Variant]) -> None:
        self.__name__ = name
        self.params = [Parameter(param) for param in params]
        self._variant = variant
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self._launched, grid)

    def _launched(self, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
        """Launch on the current device's current stream; what was compiled."""
        compiled = self.warmup(*args, grid=grid, **meta)
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        g0, g1, g2 = (*grid, 1, 1)[:3]
        compiled.run(g0, g1, g2, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
        return compiled

    def warmup(self, *args: Any, grid: tuple[int, ...], **meta: Any) -> Compiled:
        """What a launch runs, compiled, but not loaded: this needs no GPU."""
        if len(args) != len(self.params):
            names = ", ".join(param.name for param in self.params)
            raise BackendError(
                f"{self.__name__} must get {len(self.params)} arguments ({names}), got {len(args)}"
            )
        return self._compiled_for(meta)

    def cubin(self, **constants: Any) -> Cubin:
        """The machine code of a variant, and what the compilers said of it."""
        return self._compiled_for(constants).cubin

    def _compiled_for(self, meta: dict[str, Any]) -> Compiled:
        constants = {name: value for name, value in meta.items() if name not in OPTIONS}
        pdl = bool(meta.get("launch_pdl"))
        key = (pdl, *sorted((name, repr(value)) for name, value in constants.items()))
        compiled = self._compiled.get(key)
        if compiled is None:
            made = Compiled(self.__name__, functools.partial(self._variant, **constants), pdl)
            compiled = self._compiled.setdefault(key, made)
        compiled.compile()
        return compiled


class Compiled:
    """A variant: compiled by the first who wants it, loaded to each device that it is launched on."""

    def __init__(self, name: str, variant: Callable[[], Variant], pdl: bool) -> None:
        self.__name__ = name
        self._make, self._pdl = variant, pdl
        self._made: tuple[Shape, Cubin] | None = None
        self._functions: dict[int, int] = {}  # by device
        self._lock = Lock()

    def compile(self) -> tuple[Shape, Cubin]:
        """How it is launched, and its machine code."""
        if self._made is None:
            with self._lock:  # a second thread waits for the first
                if self._made is None:
                    source, threads, shared_bytes, _ = self._make()
                    self._made = Shape(threads, shared_bytes, self._pdl), nvrtc.compile(source, self.__name__)
        return self._made

    @property
    def cubin(self) -> Cubin:
        return self.compile()[1]

    @property
    def packed_metadata(self) -> Shape:
        return self.compile()[0]

    @property
    def function(self) -> int:
        """Its CUfunction on the current device."""
        device = triton.runtime.driver.active.get_current_device()
        function = self._functions.get(device)
        if function is None:
            shape, cubin = self.compile()
            with self._lock:
                function = self._functions.get(device)
                if function is None:
                    function = driver().load(device, cubin.image, self.__name__, shape.shared_bytes)
                    self._functions[device] = function
        return function

    def run(
        self, g0: int, g1: int, g2: int, stream: int, function: int, packed_metadata: Shape, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        """Launch, called as Triton's launchers are; hooks are not."""
        words: list[int] = []
        maps: list[Any] = []
        split(arguments, words, maps)
        driver().launch(function, (g0, g1, g2), stream, packed_metadata, words, maps)


def split(arguments: Sequence[Any], words: list[int], maps: list[Any]) -> None:
    """Arguments of a kernel as the words of its Params, and the descriptors of its maps. Raises BackendError for others."""
    for value in arguments:
        if type(value) is int:
            words.append(value)
        elif value is None:
            words.append(0)
        elif isinstance(value, tuple):
            split(value, words, maps)
        elif isinstance(value, DESCRIPTORS):
            maps.append(value)
        elif hasattr(value, "data_ptr"):
            words.append(value.data_ptr())
        elif isinstance(value, int):  # a bool
            words.append(int(value))
        else:
            raise BackendError(
                f"a CUDA C++ kernel takes tensors, integers, None and tensor descriptors, got a {type(value).__name__}"
            )


def boxes(rows: torch.Tensor, block: Sequence[int], swizzle: int = 128) -> GluonDescriptor:
    """A descriptor of boxes of a tensor, of any size up to 256 a side: Triton's own are powers of two.

    swizzle: bytes, 0, 32, 64 or 128; an inner row of a box has no more where there is one.
    """
    whole = [triton.next_power_of_2(side) for side in block]
    layout = NVMMASharedLayout(swizzle, 8 * rows.dtype.itemsize, len(block))
    made = GluonDescriptor.from_tensor(rows, whole, layout)
    made.block_shape = list(block)
    return made

"""The part of CUDA's driver that loads and launches kernels which are no Triton kernels, through ctypes.

A kernel takes one block of 64-bit words and any number of tensor maps, 128 bytes each, which say to the tensor memory
accelerator what to copy. The driver reads all of it before cuLaunchKernelEx returns, so each launch has memory of its
own (threads share nothing), but for the maps: those say where memory lies, are never changed, and kept by what they say.

ctypes lets go of Python's lock meanwhile: a launch may wait for a full queue.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moestro.errors import BackendError
from moestro.kernels.triton.c_library import CLibrary, relaxed

KEPT = 1024  # maps
SHARED_BYTES, PROGRAMMATIC = 8, 6  # function attribute, launch attribute: of cuda.h
OTHER_CONTEXT = (201, 400)  # a thread that has not used this device yet: invalid context, invalid handle
ELEMENTS = {8: 0, 16: 1, 32: 2, 64: 4}  # bits -> CUtensorMapDataType, unsigned
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes -> CUtensorMapSwizzle
PROMOTED = 2  # the second-level cache reads 128 bytes at once
# CUlaunchConfig: grid, threads, shared bytes, stream, attributes, their number
CONFIG = struct.Struct("=7I4xQQI4x")
MAP_BYTES, MAP_ALIGNMENT = 128, 64
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_int
FUNCTIONS = {  # of libcuda, and the types of what they take
    "cuGetErrorName": (NUMBER, ADDRESS),
    "cuDeviceGet": (ADDRESS, NUMBER),
    "cuDevicePrimaryCtxRetain": (ADDRESS, NUMBER),
    "cuCtxSetCurrent": (ADDRESS,),
    "cuThreadExchangeStreamCaptureMode": (ADDRESS,),
    "cuModuleLoadData": (ADDRESS, ctypes.c_char_p),
    "cuModuleGetFunction": (ADDRESS, ADDRESS, ctypes.c_char_p),
    "cuFuncSetAttribute": (ADDRESS, NUMBER, NUMBER),
    "cuTensorMapEncodeTiled": (ADDRESS, NUMBER, ctypes.c_uint, *[ADDRESS] * 5, *[NUMBER] * 4),
    "cuLaunchKernelEx": (ctypes.c_char_p, ADDRESS, ADDRESS, ADDRESS),
}


class Shape(NamedTuple):
    """What a launch says of a block of threads."""

    threads: int
    shared_bytes: int  # dynamic
    pdl: bool  # whether it may start before the launch ahead of it is over


class Driver:
    """CUDA's driver, for any number of threads. Raises BackendError where it refuses."""

    def __init__(self, library: Any) -> None:
        self._library = CLibrary(library, FUNCTIONS, self._name_of)
        self._launch = self._library.functions["cuLaunchKernelEx"]
        self._early = (ctypes.c_int * 18)(PROGRAMMATIC, 0, 1)  # CUlaunchAttribute: id, padding, value
        self._attributes = ctypes.addressof(self._early)
        self._contexts: dict[int, int] = {}  # torch's, by device
        self._maps: dict[tuple[int, ...], tuple[int, Any]] = {}  # (address, memory) of each

    def load(self, device: int, image: bytes, name: str, shared_bytes: int) -> int:
        """The kernel `name` of a cubin, on a device, which becomes the current one: a CUfunction."""
        self.enter(device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with relaxed(self._library):  # a module may be loaded while a graph is being captured
            self._library.call("cuModuleLoadData", ctypes.byref(module), image)
            self._library.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self._library.call("cuFuncSetAttribute", function, SHARED_BYTES, shared_bytes)
        return function.value or 0

    def enter(self, device: int) -> None:
        """Make a device's primary context, which is torch's, this thread's."""
        context = self._contexts.get(device)
        if context is None:
            handle, made = ctypes.c_int(), ctypes.c_void_p()
            self._library.call("cuDeviceGet", ctypes.byref(handle), device)
            self._library.call("cuDevicePrimaryCtxRetain", ctypes.byref(made), handle)
            context = self._contexts.setdefault(device, made.value or 0)
        self._library.call("cuCtxSetCurrent", context)

    def launch(self, function: int, grid: tuple[int, int, int], stream: int, shape: Shape,
               words: Sequence[int], maps: Sequence[TensorDescriptor]) -> None:  # fmt: skip
        """Enqueue kernel(block of words, *maps)."""
        config = CONFIG.pack(
            *grid, shape.threads, 1, 1, shape.shared_bytes, stream, self._attributes, shape.pdl
        )
        block = (ctypes.c_int64 * len(words))(*words)
        # keeps their memory until the launch has read it
        encoded = [self.map(descriptor) for descriptor in maps]
        pointers = (ctypes.c_void_p * (1 + len(maps)))(ctypes.addressof(block), *[at for at, _ in encoded])
        status = self._launch(config, function, pointers, None)
        if status in OTHER_CONTEXT:
            self.enter(triton.runtime.driver.active.get_current_device())
            status = self._launch(config, function, pointers, None)
        if status:
            raise self._library.refused("cuLaunchKernelEx", status)

    def map(self, descriptor: TensorDescriptor) -> tuple[int, Any]:
        """(address, what keeps it) of a descriptor's CUtensorMap, its layout's swizzle, zeros beyond the ends."""
        if not isinstance(descriptor, TensorDescriptor):
            raise BackendError(
                f"a tensor map is made of Gluon's TensorDescriptor, whose layout says its swizzle, got "
                f"{type(descriptor).__module__}.{type(descriptor).__name__}"
            )
        at, layout = descriptor.base.data_ptr(), descriptor.layout
        sizes = (*descriptor.shape, *descriptor.strides, *descriptor.block_shape)
        key = (at, layout.element_bitwidth, layout.swizzle_byte_width, *sizes)
        made = self._maps.get(key)
        if made is None:
            if len(self._maps) >= KEPT:
                self._maps.clear()  # a launch that has one of them keeps it
            made = self._maps[key] = self._encoded(at, descriptor)
        return made

    def _encoded(self, at: int, descriptor: TensorDescriptor) -> tuple[int, Any]:
        layout, rank = descriptor.layout, len(descriptor.shape)
        memory = (ctypes.c_uint8 * (MAP_BYTES + MAP_ALIGNMENT))()
        to = -(-ctypes.addressof(memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        size = layout.element_bitwidth // 8
        if getattr(descriptor, "padding", "zero") != "zero":
            raise BackendError(f"a tensor map's padding must be 'zero', got {descriptor.padding!r}")
        shape = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))  # the innermost first
        strides = (ctypes.c_uint64 * (rank - 1))(*(size * s for s in reversed(descriptor.strides[:-1])))
        box = (ctypes.c_uint32 * rank)(*reversed(descriptor.block_shape))
        every = (ctypes.c_uint32 * rank)(*[1] * rank)
        self._library.call("cuTensorMapEncodeTiled", to, ELEMENTS[layout.element_bitwidth], rank, at, shape, strides, box,
                           every, 0, SWIZZLES[layout.swizzle_byte_width], PROMOTED, 0)  # fmt: skip
        return to, memory

    def _name_of(self, status: int) -> str:
        """In brackets; nothing for a status that the driver does not know."""
        text = ctypes.c_char_p()
        unknown = self._library.functions["cuGetErrorName"](status, ctypes.byref(text)) or not text.value
        return "" if unknown else f" ({(text.value or b'').decode()})"


@functools.cache
def driver() -> Driver:
    """CUDA's driver, as torch has initialised it. Raises BackendError where it is not there, or too old."""
    if torch.cuda.is_available():
        torch.cuda.current_stream()
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"CUDA C++ kernels are launched by CUDA's driver, 12.0 or newer: {error}"
        ) from error

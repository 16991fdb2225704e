"""A libcuda of no GPU, which notes what it is called with: launches are read out of memory as a driver would."""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from typing import Any, NamedTuple

from moestro.kernels.triton import cuda_driver
from moestro.kernels.triton.c_library import RELAXED


class Launched(NamedTuple):
    function: int
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    stream: int
    pdl: bool
    words: tuple[int, ...]
    maps: tuple[int, ...]  # the address that each describes


class Function:
    """One function of a library, whose `called` answers for all."""

    def __init__(self, library: Any, name: str) -> None:
        self.library, self.name = library, name
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        status: int = self.library.called(self.name, arguments)
        return status


class Library:
    """Functions are numbered as they are loaded. words, maps: how many of each a launch has."""

    def __init__(self, words: int = 0, maps: int = 0) -> None:
        self.words, self.maps = words, maps
        self.calls: Counter[str] = Counter()
        self.refuses: dict[str, list[int]] = {}  # statuses of the next calls
        self.launched: list[Launched] = []
        self.encoded: list[dict[str, Any]] = []
        self.loaded: list[tuple[bytes, bytes]] = []  # (image, name)
        self.shared: list[int] = []
        self.context, self.mode = 0, 0
        for name in cuda_driver.FUNCTIONS:
            setattr(self, name, Function(self, name))

    def called(self, name: str, arguments: tuple[Any, ...]) -> int:
        self.calls[name] += 1
        refusals = self.refuses.get(name)
        if refusals:
            return refusals.pop(0)
        return getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

    def _cuGetErrorName(self, status: int, out: Any) -> int:  # noqa: N802
        if status == 999:
            return 1
        out._obj.value = b"CUDA_ERROR_ODD"
        return 0

    def _cuDeviceGet(self, out: Any, device: int) -> None:  # noqa: N802
        out._obj.value = device

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: Any) -> None:  # noqa: N802
        out._obj.value = 1000 + device.value

    def _cuCtxSetCurrent(self, context: int) -> None:  # noqa: N802
        self.context = context

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:  # noqa: N802
        mode._obj.value, self.mode = self.mode, mode._obj.value

    def _cuModuleLoadData(self, out: Any, image: bytes) -> None:  # noqa: N802
        assert self.mode == RELAXED
        self.image = image
        out._obj.value = 5

    def _cuModuleGetFunction(self, out: Any, module: Any, name: bytes) -> None:  # noqa: N802
        assert module.value == 5
        self.loaded.append((self.image, name))
        out._obj.value = len(self.loaded)

    def _cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> None:  # noqa: N802
        assert attribute == 8
        self.shared.append(value)

    def _cuTensorMapEncodeTiled(  # noqa: N802
        self,
        to: int,
        element: int,
        rank: int,
        at: int,
        shape: Any,
        strides: Any,
        box: Any,
        every: Any,
        *rest: int,
    ) -> None:
        assert to % 64 == 0
        assert len(shape) == len(box) == len(every) == len(strides) + 1 == rank
        ctypes.memmove(to, struct.pack("16q", at, *range(15)), 128)
        self.encoded.append({"element": element, "at": at, "shape": [*shape], "strides": [*strides], "box": [*box],
                             "every": [*every], "rest": rest})  # fmt: skip

    def _cuLaunchKernelEx(self, config: bytes, function: int, pointers: Any, extra: None) -> None:  # noqa: N802
        gx, gy, gz, threads, y, z, shared, stream, attributes, number = struct.unpack("7I4xQQI4x", config)
        assert (len(config), y, z, extra) == (56, 1, 1, None)
        assert len(pointers) == 1 + self.maps
        kind, _, value = (ctypes.c_int * 3).from_address(attributes)
        assert (kind, value) == (6, 1)
        words = tuple((ctypes.c_int64 * self.words).from_address(pointers[0]))
        maps = tuple(ctypes.c_int64.from_address(at).value for at in pointers[1:])
        self.launched.append(
            Launched(function, (gx, gy, gz), threads, shared, stream, number == 1, words, maps)
        )

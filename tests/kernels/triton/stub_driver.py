"""A driver of a GPU that is not there: kernels are not compiled, launches are recorded, tensors lie on the CPU.

Triton's own JITFunction.run works in front of it: what is recorded is what the launcher would be given. Each
specialisation of a kernel is another object, as its compiled kernel would be, and each variant of one in CUDA C++.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from moestro.kernels.triton.cuda import CudaKernel
from moestro.kernels.triton.replay import plain


class StubDriver:
    """Device 0, and the stream that a test sets."""

    def __init__(self) -> None:
        self.device, self.stream = 0, 0
        self.launched: list[tuple[Any, ...]] = []  # (kernel, grid, stream, function, metadata, arguments)
        self.record = True
        self.utils = SimpleNamespace()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        assert device == self.device
        return self.stream

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


class StubKernel:
    """A compiled kernel of one specialisation."""

    def __init__(self, driver: StubDriver, name: str) -> None:
        self.name, self.driver = name, driver
        self.function, self.packed_metadata = object(), object()

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, g0: int, g1: int, g2: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        if self.driver.record:
            arguments = tuple(map(plain, rest[3:]))
            self.driver.launched.append((self.name, (g0, g1, g2), stream, function, metadata, arguments))


@contextmanager
def stubbed() -> Any:
    """Triton on a StubDriver."""
    driver = StubDriver()

    def compiled(self: Any, key: Any, signature: Any, device: Any, *rest: Any, **named: Any) -> StubKernel:
        kernel = StubKernel(driver, self.fn.__name__)
        self.device_caches[device][0][key] = kernel
        return kernel

    variants: dict[tuple[Any, ...], StubKernel] = {}

    def variant(self: CudaKernel, *args: Any, grid: Any, **meta: Any) -> StubKernel:
        key = (self.__name__, driver.device, *sorted((name, repr(value)) for name, value in meta.items()))
        return variants.setdefault(key, StubKernel(driver, self.__name__))

    kind = triton.runtime.jit.JITFunction
    theirs, warmup = kind._do_compile, CudaKernel.warmup
    kind._do_compile, CudaKernel.warmup = compiled, variant  # type: ignore[method-assign]
    active = triton.runtime.driver
    before, active._active = active._active, driver
    try:
        yield driver
    finally:
        kind._do_compile, CudaKernel.warmup, active._active = theirs, warmup, before  # type: ignore[method-assign]

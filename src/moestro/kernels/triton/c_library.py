"""Functions of a C library that return a status, as CUDA's driver and NVRTC have them, called through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moestro.errors import BackendError

EXCHANGE = "cuThreadExchangeStreamCaptureMode"
RELAXED = 2  # a capture mode of cuda.h


class CLibrary:
    """`types`: name -> the types of what a function takes. Raises AttributeError for a library that lacks one.

    words: what is known of a status, for the error.
    """

    def __init__(self, library: Any, types: Mapping[str, tuple[Any, ...]],
                 words: Callable[[int], str] = lambda status: "") -> None:  # fmt: skip
        self.functions = {name: getattr(library, name) for name in types}
        for name, function in self.functions.items():
            function.argtypes, function.restype = types[name], ctypes.c_int
        self._words = words

    def call(self, name: str, *arguments: Any) -> None:
        """Raises BackendError for a status that is not 0."""
        if status := self.functions[name](*arguments):
            raise self.refused(name, status)

    def refused(self, name: str, status: int) -> BackendError:
        """What is raised for a status that is not 0."""
        return BackendError(f"{name} must return 0, got {status}{self._words(status)}")


@contextlib.contextmanager
def relaxed(driver: CLibrary) -> Iterator[None]:
    """While a graph is being captured, by this thread or another, this one may do what a capture does not allow."""
    mode = ctypes.c_int(RELAXED)
    driver.call(EXCHANGE, ctypes.byref(mode))
    try:
        yield
    finally:
        driver.call(EXCHANGE, ctypes.byref(mode))

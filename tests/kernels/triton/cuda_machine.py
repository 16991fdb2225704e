"""Runs a kernel in CUDA C++ on the CPU: its own text, after functions of hopper.cuh's names (cuda_on_cpu.h), by g++.

What is asynchronous on the GPU happens when a seeded draw says so, so that a kernel that reads too early, gives a stage
back too early or waits for the wrong phase computes NaN or stops with an error (MachineError). Each variant of a kernel
is compiled once in a process, those of a call side by side where `compile_all` goes before it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moestro.kernels.triton import cuda, cuda_source
from moestro.kernels.triton.cuda import CudaKernel

HERE = Path(__file__).parent
HEADER, MACHINE = HERE / "cuda_on_cpu.h", HERE / "cuda_on_cpu.cpp"
CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-Wno-psabi",
]
Mutants = Sequence[tuple[str, str]]  # (text, what stands there instead)

source = functools.partial(cuda_source.source, primitives=lambda widths: "")


def why_missing() -> str | None:
    return None if shutil.which(CXX) else "no C++ compiler"


class MachineError(AssertionError):
    """What the machine has to say of a kernel."""


@functools.cache
def folder() -> TemporaryDirectory[str]:
    """Of this process: the machine, and libraries by their text."""
    made = TemporaryDirectory(prefix="moestro-cuda-on-cpu-")
    subprocess.run([CXX, *FLAGS, "-O3", "-c", MACHINE, "-o", f"{made.name}/machine.o"], check=True)
    return made


@functools.cache
def library(text: str) -> Any:
    path = Path(folder().name) / hashlib.sha256(text.encode()).hexdigest()[:24]
    path.with_suffix(".cpp").write_text(text)
    files = ["-include", HEADER, f"{path}.cpp", path.with_name("machine.o"), "-o", f"{path}.so"]
    subprocess.run([CXX, *FLAGS, "-O1", "-shared", "-Wl,-Bsymbolic", *files], check=True)
    run = ctypes.CDLL(f"{path}.so").run_kernel
    run.restype = ctypes.c_char_p
    return run


class CudaMachine:
    """Stands for a CudaKernel whose constants give a text without primitives (`source` above).

    mutants: what is to be changed in the text of the kernel: a test that the machine notices.
    """

    def __init__(self, kernel: CudaKernel, seed: int = 0, mutants: Mutants = ()) -> None:
        self.__name__, self.params = kernel.__name__, kernel.params
        self._kernel, self._seed, self._mutants = kernel, seed, mutants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launched, grid)

    def _launched(self, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        variant = self._variant(meta)
        words: list[int] = []
        maps: list[Any] = []
        cuda.split(args, words, maps)
        known = [
            end
            for t in args
            if isinstance(t, torch.Tensor)
            for end in (t.data_ptr(), t.data_ptr() + t.nbytes)
        ]
        parts = _words(words), _maps(maps), _words(known)
        at = [ctypes.addressof(part) for part in parts]
        x, y, z = (*grid, 1, 1)[:3]
        launch = _words([
            at[0], len(words), -(-at[1] // 64) * 64, len(maps), at[2], len(known) // 2,
            x, y, z, variant.threads, variant.shared_bytes, self._seed, variant.cluster,
        ])  # fmt: skip
        if said := library(self._text(variant.source))(launch):
            raise MachineError(f"{self.__name__}: {said.decode()}")

    def text(self, **meta: Any) -> str:
        return self._text(self._variant(meta).source)

    def _variant(self, meta: dict[str, Any]) -> cuda.Variant:
        return self._kernel._variant(**{k: v for k, v in meta.items() if k not in cuda.OPTIONS})

    def _text(self, text: str) -> str:
        for old, new in self._mutants:
            if text.count(old) != 1:
                raise ValueError(f"the text of {self.__name__} must have one {old!r}, has {text.count(old)}")
            text = text.replace(old, new)
        return f"{text}\nRUNS({self.__name__})\n"


def compile_all(launches: Sequence[Any]) -> None:
    """The machine's kernels of some launches, side by side."""
    texts = {one.kernel.text(**one.meta) for one in launches if isinstance(one.kernel, CudaMachine)}
    folder()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(library, texts))


def _words(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _maps(descriptors: Sequence[Any]) -> Any:
    """A Map of cuda_on_cpu.h for each, from the first multiple of 64 on."""
    memory = (ctypes.c_int64 * (16 * len(descriptors) + 8))()
    first = -ctypes.addressof(memory) % 64 // 8
    for i, one in enumerate(descriptors):
        (rows, columns), (pitch, step), (height, width) = one.shape, one.strides, one.block_shape
        size, swizzle = one.base.element_size(), one.layout.swizzle_byte_width
        assert step == 1
        assert swizzle == 0 or (swizzle, size * width) == (128, 128)
        assert size * width % 16 == size * pitch % 16 == one.base.data_ptr() % 16 == 0
        assert max(height, width) <= 256
        memory[first + 16 * i : first + 16 * i + 8] = [
            one.base.data_ptr(), size * columns, rows, size * pitch, height, size * width, size, swizzle,
        ]  # fmt: skip
    return memory

"""CUDA C++ compiled in this process: NVRTC, the compiler that torch's CUDA builds bring, called through ctypes.

`compile` makes a cubin for sm_90a of some source. A kernel takes some 0.4 s, so nothing is kept on disk; ctypes lets go
of Python's lock and NVRTC takes calls of many threads, so that kernels compile side by side.

The library is looked for by its name (what torch has loaded, or the system knows), then in the folders of NVIDIA's
wheels, CUDA_HOME and /usr/local/cuda; first as torch's CUDA has it. It opens another one, libnvrtc-builtins, by name,
which nothing leads to in a wheel's folder: so that is loaded first. The one that is taken has compiled an empty kernel;
`why_missing` says what was wrong with all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moestro.errors import BackendError
from moestro.kernels.triton.c_library import CLibrary

MAJORS = ("13", "12")  # of CUDA, those that know sm_90a
# 177: a primitive that this kernel does not use
OPTIONS = (
    b"--gpu-architecture=sm_90a",
    b"--std=c++17",
    b"-default-device",
    b"--ptxas-options=-v",
    b"-diag-suppress=177",
)
EMPTY = 'extern "C" __global__ void empty() {}'
ADDRESS, NUMBER = ctypes.c_void_p, ctypes.c_int
FUNCTIONS = {  # of libnvrtc, and the types of what they take
    "nvrtcCreateProgram": (ADDRESS, ctypes.c_char_p, ctypes.c_char_p, NUMBER, ADDRESS, ADDRESS),
    "nvrtcDestroyProgram": (ADDRESS,),
    "nvrtcCompileProgram": (ADDRESS, NUMBER, ADDRESS),
    "nvrtcGetProgramLogSize": (ADDRESS, ADDRESS),
    "nvrtcGetProgramLog": (ADDRESS, ADDRESS),
    "nvrtcGetCUBINSize": (ADDRESS, ADDRESS),
    "nvrtcGetCUBIN": (ADDRESS, ADDRESS),
}


class Cubin(NamedTuple):
    """Machine code of sm_90a, and what the compilers said: ptxas tells registers, spills and serialised products."""

    image: bytes
    log: str


def compile(source: str, name: str) -> Cubin:
    """Compile CUDA C++; `name` is what the log calls it. Raises BackendError with the log, or why there is no NVRTC."""
    compiler = _found().compiler
    if compiler is None:
        raise BackendError(f"kernel {name!r} must be compiled by NVRTC: {why_missing()}")
    return compiler.compile(source, name)


def why_missing() -> str | None:
    """Why kernels cannot be compiled here: what was looked for, and what was wrong with it; None if they can be."""
    compiler, tried = _found()
    if compiler is not None:
        return None
    return f"no NVRTC of CUDA {' or '.join(MAJORS)} that compiles for sm_90a was found ({'; '.join(tried)})"


class Compiler:
    """A loaded libnvrtc; for any number of threads. Raises AttributeError for a library that is something else."""

    def __init__(self, library: Any) -> None:
        self._library = CLibrary(library, FUNCTIONS)

    def compile(self, source: str, name: str) -> Cubin:
        """See the module's `compile`."""
        program = ctypes.c_void_p()
        text, file = source.encode(), f"{name}.cu".encode()
        self._library.call("nvrtcCreateProgram", ctypes.byref(program), text, file, 0, None, None)
        try:
            options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
            status = self._library.functions["nvrtcCompileProgram"](program, len(OPTIONS), options)
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise BackendError(
                    f"kernel {name!r} must be CUDA C++ that NVRTC compiles, got status {status}:\n{log}"
                )
            return Cubin(self._bytes("CUBIN", program), log)
        finally:
            self._library.call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._library.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        self._library.call(f"nvrtcGet{what}", program, out)
        return out.raw


# --- where it is --------------------------------------------------------------------------------------------
class Found(NamedTuple):
    """What a search came to."""

    compiler: Compiler | None
    tried: tuple[str, ...]  # what was looked for before, each with what was wrong


@functools.cache
def _found() -> Found:
    tried = []
    most = _driver_knows()
    for path in candidates():
        if most is not None and int(path.rsplit(".", 1)[1]) > most:
            tried.append(f"{path}: the driver loads what CUDA {most} compiles, at most")
            continue
        try:
            compiler = Compiler(_loaded(path))
            compiler.compile(EMPTY, "empty")
        except (OSError, AttributeError, BackendError) as error:
            tried.append(" ".join(f"{path}: {error}".split()))
        else:
            return Found(compiler, tuple(tried))
    return Found(None, tuple(tried))


def _driver_knows() -> int | None:
    """The major version of CUDA that the driver is of; None where there is no driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else version.value // 1000


def candidates() -> list[str]:
    """Names and paths to load, the best first; a path is of a file that may not be there."""
    ours = (torch.version.cuda or "").split(".")[0]
    majors = sorted(MAJORS, key=lambda major: major != ours)
    names = {major: f"libnvrtc.so.{major}" for major in majors}
    return [path for m in majors for path in (names[m], *(str(f / names[m]) for f in folders()))]


def folders() -> list[Path]:
    """Where NVIDIA's wheels put it, one after another, and where CUDA is installed."""
    spec = importlib.util.find_spec("nvidia")  # a package of many wheels
    roots = [Path(path) for path in (spec.submodule_search_locations or () if spec else ())]
    roots.append(Path(torch.__file__).parents[1] / "nvidia")
    wheels = [root / name for root in roots for name in ("cu13/lib", "cuda_nvrtc/lib")]
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    conda = os.environ.get("CONDA_PREFIX")
    installed = [*(Path(home) / "lib64" for home in homes if home), *([Path(conda) / "lib"] if conda else ())]
    return list(dict.fromkeys([*wheels, *installed]))


def _loaded(path: str) -> ctypes.CDLL:
    """The library, its builtins loaded before it. Raises OSError where it is not."""
    if "/" in path:
        _load_builtins(Path(path).parent)
        return ctypes.CDLL(path)
    library = ctypes.CDLL(path)
    for folder in _mapped(path):
        _load_builtins(folder)
    return library


def _load_builtins(folder: Path) -> None:
    """Of the version beside it: one of another version has another name, and does no harm."""
    for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(builtins))


def _mapped(name: str) -> Iterator[Path]:
    """The folders that this process has a library from."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        files = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
        yield from sorted({Path(file).parent for file in files if Path(file).name.startswith(name)})

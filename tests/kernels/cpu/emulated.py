"""The core of a 64-bit ARM under qemu, in place of this machine's: CpuRunner and its tests run as they are.

The sources are compiled with setup.py's flags by a cross compiler and linked, statically, with emulated_main.cpp, which
qemu-user runs as a process: calls go to it over a pipe. Packing is this machine's, whose bytes are the same (a test
holds them to be).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from test_sanitized import ROOT

from moestro.kernels.cpu import core

HERE = Path(__file__).parent
INSTALL = "apt install g++-aarch64-linux-gnu qemu-user-static"
ISAS, WORKSPACE, MOE, RATE, PACK_BF16, PACK_FP8, PACK_FP4 = range(7)  # of emulated_main.cpp
OPTIMISE = "-O2"  # instead of -O3: half the time, the same numbers


def cross_compiler() -> list[str] | None:
    """g++ for ARM (Debian's g++-aarch64-linux-gnu), or the clang in the ziglang package."""
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return [gcc]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def why_not() -> str | None:
    """Why the ARM core cannot be run here, with what to install; None if it can."""
    missing = [
        name
        for name, found in (
            ("a cross compiler", shutil.which("aarch64-linux-gnu-g++")),
            ("qemu-user", emulator()),
        )
        if found is None
    ]
    return f"no {' and no '.join(missing)}: {INSTALL}" if missing else None


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_all(build: ModuleType, compiler: Sequence[str], flags: Sequence[str], folder: Path) -> list[Path]:
    """The core's sources for the machine that setup.py takes this for, and the program around it."""
    sources = [*(ROOT / source for source in build.sources()), HERE / "emulated_main.cpp"]

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = build.isa_flags().get(source.name, "").split()
        common = build.COMMON.replace("-O3", OPTIMISE).split()
        include = f"-I{ROOT / build.CSRC}"
        run([*compiler, *common, *own, *flags, include, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def program(build: ModuleType) -> Path:
    """The emulated program, compiled once for its sources and flags."""
    compiler = cross_compiler()
    assert compiler is not None
    digest = hashlib.sha256(f"{compiler} {OPTIMISE}".encode())
    csrc = (ROOT / build.CSRC).iterdir()
    for path in (*sorted(csrc), ROOT / "setup.py", HERE / "emulated_main.cpp", HERE / "emulated.py"):
        digest.update(path.read_bytes())
    found = Path(tempfile.gettempdir()) / f"moestro-arm-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not found.exists():
        with tempfile.TemporaryDirectory() as folder:
            objects = compile_all(build, compiler, [], Path(folder))
            made = Path(folder) / "program"
            run([*compiler, "-static", "-pthread", *map(str, objects), "-o", str(made)])
            waiting = found.with_suffix(f".{os.getpid()}")
            shutil.copy2(made, waiting)
            waiting.replace(found)  # another process may have been as quick
    return found


def struct_of(given: Any) -> Any:
    """The struct behind a ctypes.byref."""
    return given._obj


class EmulatedCore:
    """The functions of the compiled core that CpuRunner calls. `processor` is one of qemu's."""

    def __init__(self, path: Path, native: Any, processor: str = "max") -> None:
        qemu = emulator()
        assert qemu is not None
        self._native, self._lock = native, threading.Lock()
        self._process = subprocess.Popen(
            [qemu, "-cpu", processor, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)  # packing

    def ask(self, request: int, *pieces: bytes, answer: int) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            stdin.write(b"".join((request.to_bytes(4, "little"), *pieces)))
            stdin.flush()
            found = stdout.read(answer)
        assert len(found) == answer, f"the emulated core ended: {self._process.poll()}"
        return found

    def moestro_cpu_isas(self) -> int:
        return int.from_bytes(self.ask(ISAS, answer=4), "little")

    def moestro_cpu_workspace(self, layer: Any, tactic: Any, tokens: int) -> int:
        pieces = bytes(struct_of(layer)), bytes(struct_of(tactic)), tokens.to_bytes(8, "little")
        return int.from_bytes(self.ask(WORKSPACE, *pieces, answer=8), "little")

    def moestro_cpu_moe(self, layer_at: Any, tactic: Any, call: bytes) -> int:
        layer = struct_of(layer_at)
        tokens, x, ids, weights, out, _, _ = core.CALL.unpack(call)
        size = 4 if layer.x_type == core.X_TYPES.index("float32") else 2
        out_bytes, pairs = tokens * layer.hidden * size, tokens * layer.top_k
        pieces = [
            *(bytes(part) for part in (layer, struct_of(tactic), call)),
            out_bytes.to_bytes(8, "little"),
            *matrix_pieces(layer, layer.gate_up, layer.intermediate * (1 + layer.gated), layer.hidden),
            *matrix_pieces(layer, layer.down, layer.hidden, layer.intermediate),
            *tensor(x, out_bytes),
            *tensor(ids, 4 * pairs),
            *tensor(weights, 4 * pairs),
        ]
        found = self.ask(MOE, *pieces, answer=4 + out_bytes)
        ctypes.memmove(out, found[4:], out_bytes)
        return int.from_bytes(found[:4], "little", signed=True)

    def rate(self, isa: str, arithmetic: str) -> float:
        pieces = (
            core.ISAS.index(isa).to_bytes(4, "little"),
            core.ARITHMETICS.index(arithmetic).to_bytes(4, "little"),
        )
        return ctypes.c_double.from_buffer_copy(self.ask(RATE, *pieces, answer=8)).value

    def pack(
        self, request: int, source: torch.Tensor, scale: torch.Tensor | None, gated: bool, columns: int
    ) -> bytes:
        """An expert's panels, codes then scales; `columns` of the matrix."""
        rows, per_scale = len(source), columns // scale.shape[1] if scale is not None else 16
        sizes = b"".join(value.to_bytes(8, "little") for value in (rows, columns, per_scale, int(gated)))
        tensors = [
            tensor(t.data_ptr() if t is not None else None, t.nbytes if t is not None else 0)
            for t in (source, scale)
        ]
        answer = source.nbytes + (scale.nbytes if scale is not None else 0)
        return self.ask(request, sizes, *tensors[0], *tensors[1], answer=answer)


def tensor(at: int | None, nbytes: int) -> tuple[bytes, bytes]:
    if at is None:
        return (-1).to_bytes(8, "little", signed=True), b""
    return nbytes.to_bytes(8, "little"), ctypes.string_at(at, nbytes)


def matrix_pieces(layer: Any, matrix: Any, rows: int, columns: int) -> list[bytes]:
    weights, name = layer.experts * rows * columns, list(core.FORMATS)[layer.format]
    codes = {"bf16": 2 * weights, "fp8_block": weights}.get(name, weights // 2)
    groups = weights // (matrix.group or weights)  # of int4
    scales = {
        "bf16": 0,
        "nvfp4": weights // 16,
        "mxfp4": weights // 32,
        "fp8_block": layer.experts * rows // 16 * -(-columns // (layer.scale_columns or 1)) * 4,
        "int4": groups * (4 if matrix.scale_type == core.X_TYPES.index("float32") else 2),
    }[name]
    sizes = codes, scales, 4 * layer.experts * rows, 4 * layer.experts * rows, groups
    fields = matrix.codes, matrix.scales, matrix.row_scale, matrix.bias, matrix.zeros
    return [piece for at, nbytes in zip(fields, sizes, strict=True) for piece in tensor(at, nbytes)]

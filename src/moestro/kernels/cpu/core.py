"""The compiled core: found, loaded with ctypes, and asked which instruction sets this machine has.

MOESTRO_CPU_ISA forces one of "amx", "avx512", "avx_vnni", "avx2", on 64-bit ARM one of "neon_bf16", "neon_dot", "neon",
or "generic"; otherwise the first of these that the machine has is used. "amx_emulated" runs the AMX path with its tile
instructions in plain C++, for tests.
Parallel regions run on the OpenMP runtime that torch brought into the process, if there is one.
MOESTRO_CPU_CORE names another build of the core to load.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import Any

from moestro.errors import BackendError, unknown_name
from moestro.kernels.activations import Code

ABI = 6
ISAS = (  # in the core's numbering
    *("generic", "avx2", "avx_vnni", "avx512", "amx", "amx_emulated"),
    *("neon", "neon_dot", "neon_bf16"),
)
FASTEST_FIRST = ("amx", "avx512", "avx_vnni", "avx2", "neon_bf16", "neon_dot", "neon", "generic")
ARITHMETICS = (
    "float32",
    "bf16",
    "int16",
    "int8",
)  # in the core's numbering: what moestro_cpu_rate multiplies
ISA_VARIABLE = "MOESTRO_CPU_ISA"
FORMATS = {"bf16": 0, "nvfp4": 1, "mxfp4": 2, "fp8_block": 3, "int4": 4}
INPUT_FORMATS: dict[str | None, int] = {None: 0, "int8": 1}
ACTIVATIONS = frozenset({Code.SWIGLU, Code.GEGLU_TANH, Code.RELU2})  # of csrc/epilogue.h
X_TYPES = ("bfloat16", "float16", "float32")  # torch's names, in the core's numbering


class Matrix(ctypes.Structure):
    """MoestroMatrix of csrc/moestro_cpu.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "row_scale", "bias", "zeros")),
        *((name, ctypes.c_int32) for name in ("group", "scale_type")),
    ]


class Layer(ctypes.Structure):
    """MoestroLayer of csrc/moestro_cpu.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("isa", "format", "experts", "expert_offset", "top_k")),
        *((name, ctypes.c_int32) for name in ("hidden", "intermediate", "activation", "gated", "x_type")),
        *((name, ctypes.c_int32) for name in ("input_format", "batch_invariant", "scale_columns")),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "up_shift")),
        ("gate_up", Matrix),
        ("down", Matrix),
    ]


class TacticStruct(ctypes.Structure):
    """MoestroTactic of csrc/moestro_cpu.h."""

    _fields_ = [
        (name, ctypes.c_int32) for name in ("token_tile", "row_tile", "dequant_from", "wave", "threads")
    ]


# MoestroCall of csrc/moestro_cpu.h as bytes: tokens, x, ids, weights, out, workspace, workspace_bytes. Making a struct of
# ctypes for each call takes 0.5 µs more.
CALL = struct.Struct("q5Qq")


def why_no_core() -> str | None:
    """Why there is no compiled core on this machine; None if there is one."""
    try:
        load()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def load() -> Any:
    """The core. Raises BackendError if it was not built, or is another version's."""
    override = os.environ.get("MOESTRO_CPU_CORE", "")
    found = [Path(override)] if override else sorted(Path(__file__).parent.glob("_core*.so"))
    if not found:
        raise BackendError("the CPU core is not compiled: install moestro with a C++17 compiler at hand")
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise BackendError(f"the CPU core {found[0].name} cannot be loaded: {error}") from error
    if (abi := lib.moestro_cpu_abi()) != ABI:
        raise BackendError(f"the CPU core {found[0].name} has ABI {abi}, expected {ABI}: reinstall moestro")
    _declare(lib)
    lib.moestro_cpu_use_openmp(_gomp_parallel())
    # A forked child has none of OpenMP's threads, and libgomp waits for them for ever: it gets the core's own pool.
    os.register_at_fork(after_in_child=functools.partial(lib.moestro_cpu_use_openmp, None))
    return lib


def _declare(lib: Any) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.moestro_cpu_use_openmp.argtypes = [pointer]
    lib.moestro_cpu_use_openmp.restype = None
    lib.moestro_cpu_workspace.argtypes = [pointer, pointer, i64]
    lib.moestro_cpu_workspace.restype = i64
    # moestro_cpu_moe has no argtypes: it gets byref() and bytes alone, and converting them would take 0.2 µs of each call.
    lib.moestro_cpu_linear_workspace.argtypes = [pointer, pointer, i64]
    lib.moestro_cpu_linear_workspace.restype = i64
    lib.moestro_cpu_linear.argtypes = [pointer, pointer, i64, pointer, pointer, pointer, i64]
    for way in ("pack", "unpack"):
        bf16, fp8, fp4 = (getattr(lib, f"moestro_cpu_{way}_{fmt}") for fmt in ("bf16", "fp8", "fp4"))
        bf16.argtypes = fp8.argtypes = [pointer, pointer, i64, i64, i32, i32]
        fp4.argtypes = [pointer, pointer, pointer, pointer, i64, i64, i64, i32, i32]
        bf16.restype = fp8.restype = fp4.restype = None
    lib.moestro_cpu_rate.argtypes = [i32, i32, ctypes.c_double, i32]
    lib.moestro_cpu_rate.restype = ctypes.c_double
    lib.moestro_cpu_read.argtypes = [pointer, i64, i32]
    lib.moestro_cpu_read.restype = ctypes.c_uint64
    lib.moestro_cpu_advise_huge.argtypes = [pointer, i64]
    lib.moestro_cpu_advise_huge.restype = None


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in this process: torch loads its OpenMP runtime with global symbols."""
    import torch  # noqa: F401

    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the core can use here, fastest first; the emulated one last."""
    found = load().moestro_cpu_isas()
    order = (*FASTEST_FIRST, "amx_emulated")
    return tuple(name for name in order if found >> ISAS.index(name) & 1)


def choose_isa() -> str:
    """The forced instruction set, or the fastest.

    Raises BackendError if the forced one is unknown or this machine lacks it.
    """
    available = available_isas()
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return available[0]
    if forced not in ISAS:
        raise BackendError(f"{ISA_VARIABLE}: {unknown_name('instruction set', forced, ISAS)}")
    if forced not in available:
        raise BackendError(f"{ISA_VARIABLE}={forced}: this machine has {', '.join(available)}")
    return forced

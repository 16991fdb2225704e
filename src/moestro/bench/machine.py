"""What this machine has: processor, memory, GPUs, and the software that kernels depend on.

Facts only, each read from where the system keeps it; what cannot be read is None. `moestro doctor` shows
them and results carry them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["CPU_FEATURES", "Cpu", "Gpu", "Memory", "compiler", "cpu", "driver", "gpus", "memory", "version"]

# /proc/cpuinfo flag -> what MoE kernels use it for
CPU_FEATURES = {
    "avx2": "256-bit vectors",
    "f16c": "half to float conversion",
    "avx512f": "512-bit vectors",
    "avx512_bf16": "bf16 dot products",
    "avx512_vnni": "int8 dot products",
    "avx512_fp16": "half arithmetic",
    "amx_tile": "tile registers",
    "amx_bf16": "bf16 tile products",
    "amx_int8": "int8 tile products",
    "asimd": "128-bit vectors (Arm)",
    "sve": "scalable vectors (Arm)",
    "bf16": "bf16 products (Arm)",
}


@dataclass(frozen=True)
class Cpu:
    name: str
    cores: int  # that this process may use
    features: tuple[str, ...]  # of CPU_FEATURES
    cache_bytes: int | None  # the last level, shared


@dataclass(frozen=True)
class Memory:
    total: int  # bytes
    available: int


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    capability: str  # "9.0"
    memory: int  # bytes


def cpu() -> Cpu:
    """The processor as this process sees it."""
    info = _read("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    return Cpu(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        features=tuple(name for name in CPU_FEATURES if name in flags),
        cache_bytes=_cache_bytes(),
    )


def _cache_bytes() -> int | None:
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := _read(path).strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=None)


def memory() -> Memory | None:
    """Main memory, in bytes."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    try:
        total, available = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        return None
    return Memory(total, available)


def gpus() -> tuple[Gpu, ...] | str:
    """The CUDA devices that torch can use, or why there are none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch has CUDA but finds no device" + ("" if driver() else ", and there is no NVIDIA driver")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Gpu(index, gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for index, gpu in enumerate(found)
    )


def driver() -> str | None:
    """The NVIDIA driver's version."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def compiler() -> str | None:
    """The C++ compiler: its path and first line of --version."""
    path = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return path
    return f"{path} ({done.stdout.splitlines()[0].strip()})" if done.stdout else path


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

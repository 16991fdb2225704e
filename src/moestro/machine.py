"""What this machine has: processor, caches, memory, threads, GPUs, and the software that kernels depend on.

Facts only, each read in one place from where the system keeps it; what cannot be read is None. Environments of
decisions, the timers that flush caches, `moestro doctor` and recorded results all ask here, so that they say the
same, and counts of bytes in the same words. Nothing here imports torch but `gpus`; where torch is loaded it is asked.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = [
    "CPU_FEATURES",
    "Cpu",
    "Gpu",
    "Memory",
    "bytes_text",
    "compiler",
    "cpu",
    "cpu_name",
    "driver",
    "gpus",
    "last_level_cache_bytes",
    "memory",
    "threads",
    "version",
]

CPU_ROOT = Path("/sys/devices/system/cpu")
CACHE_GUESS = 64 << 20  # where /sys says nothing
CACHE_MOST = 1 << 30

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
    "asimddp": "int8 dot products (Arm)",
    "sve": "scalable vectors (Arm)",
    "bf16": "bf16 products (Arm)",
}


# Arm's own cores by the part number of /proc/cpuinfo (their manuals' MIDR_EL1); others are named by their numbers.
ARM_IMPLEMENTERS = {
    "0x41": "Arm",
    "0x46": "Fujitsu",
    "0x48": "HiSilicon",
    "0x4e": "NVIDIA",
    "0x51": "Qualcomm",
}
ARM_IMPLEMENTERS |= {"0x61": "Apple", "0xc0": "Ampere"}
ARM_PARTS = {
    **{"0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd08": "Cortex-A72", "0xd0b": "Cortex-A76"},
    **{"0xd41": "Cortex-A78", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd49": "Neoverse-N2"},
    **{"0xd4f": "Neoverse-V2", "0xd84": "Neoverse-V3", "0xd8e": "Neoverse-N3"},
}


@dataclass(frozen=True)
class Cpu:
    name: str
    cores: int  # that this process may use
    features: tuple[str, ...]  # of CPU_FEATURES
    cache_bytes: int  # of last-level cache that these cores reach


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
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        name=cpu_name(),
        cores=len(_cpus()),
        features=tuple(name for name in CPU_FEATURES if name in flags),
        cache_bytes=last_level_cache_bytes(),
    )


@functools.cache
def cpu_name() -> str:
    """The processor's name; of an ARM, which states numbers alone, that of its kinds of cores."""
    named = _cpuinfo().get("model name") or arm_name(_read("/proc/cpuinfo"))
    return named or platform.processor() or platform.machine() or "cpu"


def arm_name(cpuinfo: str) -> str | None:
    """ "Arm Neoverse-N1" of an ARM's /proc/cpuinfo, "Arm Cortex-A55 + Cortex-A76" of two kinds; None of another's."""
    found = re.findall(r"^CPU (implementer|part)\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    who = next((value for key, value in found if key == "implementer"), None)
    if who is None:
        return None
    parts = dict.fromkeys(value for key, value in found if key == "part")  # each once, in order
    names = [ARM_PARTS.get(part, f"part {part}") if who == "0x41" else f"part {part}" for part in parts]
    return f"{ARM_IMPLEMENTERS.get(who, f'implementer {who}')} {' + '.join(names)}".strip()


def threads() -> int:
    """How many threads torch's CPU kernels use here: torch's answer where it is loaded, else the same one before
    it is.

    $OMP_NUM_THREADS, $MKL_NUM_THREADS, or one for each physical core that this process may use: what torch
    starts with (MKL caps what is asked for at the cores). So one machine is one environment, whether a process has
    imported torch by then or not.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    siblings = {
        _read(CPU_ROOT / f"cpu{i}" / "topology" / "thread_siblings_list").strip() or str(i) for i in _cpus()
    }
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        given = os.environ.get(name, "").split(",")[0].strip()
        if given.isdigit() and int(given) > 0:
            return min(int(given), len(siblings))
    return len(siblings)


def last_level_cache_bytes(root: Path | None = None) -> int:
    """Bytes of last-level cache that the CPUs of this process can reach, each cache counted once; 64 MiB where
    /sys does not say, 1 GiB at most.
    """
    caches: dict[str, int] = {}
    for number in _cpus():
        folder = (root or CPU_ROOT) / f"cpu{number}" / "cache"
        found = max((level for index in folder.glob("index*") if (level := _cache(index))), default=None)
        if found is not None:
            rank, shared, size = found
            caches[f"{rank}:{shared}"] = size
    return min(sum(caches.values()) or CACHE_GUESS, CACHE_MOST)


def _cache(index: Path) -> tuple[int, str, int] | None:
    """(level, CPUs that share it, bytes) of one /sys entry; None for an instruction cache or an odd entry."""
    try:
        kind, level, shared, size = (
            (index / name).read_text().strip() for name in ("type", "level", "shared_cpu_list", "size")
        )
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 0)
        bytes_ = int(size[:-1]) * unit if unit else int(size)
        return (int(level), shared, bytes_) if kind != "Instruction" and bytes_ > 0 else None
    except (OSError, ValueError):
        return None


def _cpus() -> list[int]:
    """The CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


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


@functools.cache
def driver() -> str | None:
    """The NVIDIA driver's version: the kernel module's, else what nvidia-smi says."""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _read("/proc/driver/nvidia/version").partition("\n")[0])
    if found:
        return found.group(1)
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


@functools.cache
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


def bytes_text(count: float) -> str:
    """Binary units with three significant digits or so: 324 MiB, 1.13 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")

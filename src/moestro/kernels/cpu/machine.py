"""What the system lets this process have of the processor: CPUs (affinity, cpusets), time (cgroups), kinds of cores.

A container's quota is time, not cores: torch sees all cores, and threads beyond the quota are stopped for the rest
of each period (100 ms by default) while the others wait for them. So the cpu backend takes no more threads than that.
Threads beyond the CPUs that the process may use are what somebody asked torch for: they run, and a warning says so.
Threads are not pinned: they are torch's own, and work is handed out as they get free, so a slow core takes less of
it. Everything is read from /proc and /sys under `root`; what is not there is None.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["allowed_cpus", "core_kinds", "cores", "pinned_by", "quota", "threads"]

# With any of these OpenMP pins threads, the first one too: its CPUs are not all that the process may use.
PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def threads() -> int:
    """torch's threads, or as many as the cgroups' quota feeds; a warning that names both, once, where torch has more
    than these or than the process has CPUs."""
    wanted, allowed = torch.get_num_threads(), quota()
    most = wanted if allowed is None else max(1, math.floor(allowed + 0.01))
    if most < wanted:
        _warn(wanted, most, allowed)
    elif (cpus := _num_cpus()) is not None and cpus < wanted:
        _warn_of_cpus(wanted, cpus)
    return min(wanted, most)


@functools.cache
def _warn(wanted: int, most: int, allowed: float | None) -> None:
    warnings.warn(
        f"the cgroups of this process allow {allowed:g} cores' worth of time: the cpu backend takes {most} "
        f"thread{'s' if most > 1 else ''}, torch has {wanted}",
        stacklevel=4,
    )


@functools.cache
def _warn_of_cpus(wanted: int, cpus: int) -> None:
    warnings.warn(
        f"torch has {wanted} threads, this process may use {cpus} CPU{'s' if cpus > 1 else ''}: the cpu backend takes "
        f"{wanted}, which wait for each other; torch.set_num_threads({cpus}) is faster",
        stacklevel=4,
    )


@functools.cache
def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's cgroups (v2, or v1) allow; None: no limit that can be read."""
    limits = [_limit(folder) for folder in _folders(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _folders(root: Path) -> list[Path]:
    """The process's cgroup folders, with all that they are in: the least of their limits holds."""
    found = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount in (
            {"cpu", controllers} if controllers else {""}
        ):  # of the first version "cpu,cpuacct", or a link
            base = root / "sys/fs/cgroup" / mount
            found += [base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return found or [root / "sys/fs/cgroup", root / "sys/fs/cgroup/cpu"]


def _limit(folder: Path) -> float | None:
    words = read(folder / "cpu.max").split()  # v2: "max 100000" or "200000 100000"
    if not words:
        words = [
            read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]  # v1: -1 is no limit
    try:
        time, period = (int(word) for word in words)
    except ValueError:
        return None
    return time / period if time > 0 and period > 0 else None


def allowed_cpus(root: Path = Path("/")) -> frozenset[int] | None:
    """The CPUs that affinity and cpusets leave to this process; None where that cannot be told."""
    return None if pinned_by() else status_list("Cpus_allowed_list", root)


def pinned_by() -> str | None:
    """The environment variable, as it is set, by which OpenMP was told to pin its threads."""
    off = ("", "false", "none", "disabled")
    pinning = (
        f"{name}={os.environ[name]}" for name in PINNING if os.environ.get(name, "").lower() not in off
    )
    return next(pinning, None)


def status_list(name: str, root: Path) -> frozenset[int] | None:
    """A list of numbers of /proc/self/status."""
    for line in read(root / "proc/self/status").splitlines():
        key, _, text = line.partition(":")
        if key == name:
            return numbers_of(text)
    return None


def numbers_of(text: str) -> frozenset[int]:
    """ "0-3,8" as the system writes lists of CPUs and nodes."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@functools.cache
def _num_cpus() -> int | None:
    cpus = allowed_cpus()
    return len(cpus) if cpus else None


def _cpu_folders(root: Path) -> list[Path]:
    """/sys of the CPUs that this process may use and that are on."""
    usable = allowed_cpus(root)
    online = numbers_of(read(root / "sys/devices/system/cpu/online"))
    folders = (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
    numbers = {int(path.name[3:]): path for path in folders}
    kept = (n for n in sorted(numbers) if (usable is None or n in usable) and (not online or n in online))
    return [numbers[n] for n in kept]


def cores(root: Path = Path("/")) -> tuple[int, int]:
    """(CPUs that this process may use, cores that these are threads of): siblings share a core's multipliers."""
    folders = _cpu_folders(root)
    siblings = {read(cpu / "topology/thread_siblings_list").strip() or cpu.name for cpu in folders}
    return len(folders), len(siblings)


def core_kinds(root: Path = Path("/")) -> tuple[tuple[float, int], ...]:
    """How many CPUs, of those that this process may use, there are of each highest frequency (MHz), or of each
    capacity on ARM; fastest first.

    Cores of one kind differ by a few per cent in what their firmware states: below 15 % they are one kind.
    """
    return _kinds(
        read(cpu / "cpu_capacity") or read(cpu / "cpufreq/cpuinfo_max_freq") for cpu in _cpu_folders(root)
    )


def _kinds(texts: Iterable[str]) -> tuple[tuple[float, int], ...]:
    found = [float(text) for text in texts if text.strip().isdigit()]
    kinds: list[tuple[float, int]] = []
    for value in sorted((value / 1000 if value > 10_000 else value for value in found), reverse=True):
        if kinds and value > 0.85 * kinds[-1][0]:
            kinds[-1] = (kinds[-1][0], kinds[-1][1] + 1)
        else:
            kinds.append((value, 1))
    return tuple(kinds)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

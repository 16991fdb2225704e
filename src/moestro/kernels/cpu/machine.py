"""What the system lets this process have of the processor: time (cgroups), kinds of cores, memory nodes, huge pages.

A container's quota is time, not cores: torch sees all cores, and threads beyond the quota are stopped for the rest
of each period (100 ms by default) while the others wait for them. So the cpu backend takes no more threads than that.
Everything is read from /proc and /sys; what is not there is None.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Placement", "placement", "quota", "threads"]


@dataclass(frozen=True)
class Placement:
    """What a process on this machine should know before it starts threads."""

    quota: float | None  # cores' worth of time that the process's cgroups allow; None: all
    threads: int  # that the cpu backend takes
    core_kinds: tuple[
        tuple[float, int], ...
    ]  # (highest MHz or capacity, cores) of a hybrid processor; else one or none
    numa_nodes: int  # with memory
    huge_pages: str | None  # transparent ones: "always", "madvise" or "never"


def placement() -> Placement:
    return Placement(quota(), threads(), core_kinds(), numa_nodes(), huge_pages())


def threads() -> int:
    """torch's threads, or as many as the cgroups' quota feeds, with one warning that names both."""
    wanted, allowed = torch.get_num_threads(), quota()
    most = wanted if allowed is None else max(1, math.floor(allowed + 0.01))
    if most < wanted:
        _warn(wanted, most, allowed)
    return min(wanted, most)


@functools.cache
def _warn(wanted: int, most: int, allowed: float | None) -> None:
    warnings.warn(
        f"the cgroups of this process allow {allowed:g} cores' worth of time: the cpu backend takes {most} "
        f"thread{'s' if most > 1 else ''}, torch has {wanted}",
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
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        parts = [part for part in path.split("/") if part and part != ".."]
        found += [base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return found or [root / "sys/fs/cgroup", root / "sys/fs/cgroup/cpu"]


def _limit(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()  # v2: "max 100000" or "200000 100000"
    if not words:
        words = [
            _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]  # v1: -1 is no limit
    try:
        time, period = (int(word) for word in words)
    except ValueError:
        return None
    return time / period if time > 0 and period > 0 else None


def core_kinds(root: Path = Path("/")) -> tuple[tuple[float, int], ...]:
    """How many cores there are of each highest frequency (MHz), or of each capacity on ARM; fastest first.

    Cores of one kind differ by a few per cent in what their firmware states: below 15 % they are one kind.
    """
    found: list[float] = []
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        text = _read(cpu / "cpu_capacity") or _read(cpu / "cpufreq/cpuinfo_max_freq")
        if text.strip().isdigit():
            value = float(text)
            found.append(value / 1000 if value > 10_000 else value)
    kinds: list[tuple[float, int]] = []
    for value in sorted(found, reverse=True):
        if kinds and value > 0.85 * kinds[-1][0]:
            kinds[-1] = (kinds[-1][0], kinds[-1][1] + 1)
        else:
            kinds.append((value, 1))
    return tuple(kinds)


def numa_nodes(root: Path = Path("/")) -> int:
    return sum(1 for _ in (root / "sys/devices/system/node").glob("node[0-9]*")) or 1


def huge_pages(root: Path = Path("/")) -> str | None:
    """How the system hands out transparent huge pages: the word in brackets."""
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0] or None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

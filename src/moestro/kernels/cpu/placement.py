"""All that `moestro doctor` says of threads and memory on this machine, and what the cpu backend will do about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moestro.kernels.cpu import machine, memory

__all__ = ["Placement", "placement"]


@dataclass(frozen=True)
class Placement:
    """What a process on this machine should know before it starts threads and packs weights."""

    quota: float | None  # cores' worth of time that the process's cgroups allow; None: all
    threads: int  # that the cpu backend takes
    pinned_by: str | None  # the variable by which OpenMP was told to pin them; the cpu backend does not
    cpus_allowed: int  # hardware threads that affinity and cpusets leave to the process; 0: not known
    cores_allowed: int  # that these are threads of
    core_kinds: tuple[
        tuple[float, int], ...
    ]  # (highest MHz or capacity, CPUs); several of a hybrid processor
    numa_nodes: tuple[memory.Node, ...]
    spread_nodes: tuple[int, ...]  # over which weights are spread; none: they lie where they are packed
    huge_pages: str | None  # transparent ones: "always", "madvise" or "never"


def placement(root: Path = Path("/")) -> Placement:
    cpus, cores = machine.cores(root)
    return Placement(
        quota=machine.quota(root),
        threads=machine.threads(),
        pinned_by=machine.pinned_by(),
        cpus_allowed=cpus,
        cores_allowed=cores,
        core_kinds=machine.core_kinds(root),
        numa_nodes=memory.nodes(root),
        spread_nodes=memory.spread_nodes(root),
        huge_pages=memory.huge_pages(root),
    )

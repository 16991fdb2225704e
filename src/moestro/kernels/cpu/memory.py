"""Where weights lie: spread over memory nodes, in huge pages where the system gives them.

A page lies on the node of the thread that first writes it, and packing may well run on one; so on a machine whose
CPUs, of those that this process may use, are on several nodes with memory of their own, the pages of packed weights
are dealt out to these nodes in turn (mbind, MPOL_INTERLEAVE) before they are written: any thread may take any expert,
and all nodes' memories are read at once. On one node nothing is asked for. Linux alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.kernels.cpu import core, machine

__all__ = ["Node", "huge_pages", "nodes", "prepare", "spread", "spread_nodes"]

MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
INTERLEAVE = 3  # MPOL_INTERLEAVE of linux/mempolicy.h
MOST_NODES = 1024  # bits of a mask


@dataclass(frozen=True)
class Node:
    """A memory node that this process may use."""

    number: int
    cpus: int  # of it, that this process may use
    memory: bool  # whether it has some that this process may use


def nodes(root: Path = Path("/")) -> tuple[Node, ...]:
    """The nodes of which this process may use a CPU or memory; none where the system has no nodes."""
    folder = root / "sys/devices/system/node"
    numbers = sorted(int(path.name[4:]) for path in folder.glob("node[0-9]*"))
    with_memory = machine.numbers_of(machine.read(folder / "has_memory")) if numbers else frozenset()
    allowed = machine.status_list("Mems_allowed_list", root)
    usable = machine.allowed_cpus(root)
    found = []
    for number in numbers:
        cpus = machine.numbers_of(machine.read(folder / f"node{number}" / "cpulist"))
        here = len(cpus if usable is None else cpus & usable)
        memory = number in with_memory and (allowed is None or number in allowed)
        found.append(Node(number, here, memory))
    return tuple(node for node in found if node.cpus or node.memory)


def spread_nodes(root: Path = Path("/")) -> tuple[int, ...]:
    """The nodes over which weights are spread: those with memory and CPUs that this process may use, if several."""
    both = tuple(node.number for node in nodes(root) if node.cpus and node.memory)
    return both if len(both) > 1 else ()


def huge_pages(root: Path = Path("/")) -> str | None:
    """How the system hands out transparent huge pages: the word in brackets."""
    text = machine.read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0] or None


def prepare(out: torch.Tensor) -> None:
    """Say where the pages of a tensor that nobody has written yet are to lie, and that they be huge."""
    if over := _spread_here():
        spread(out.data_ptr(), out.nbytes, over)
    core.load().moestro_cpu_advise_huge(out.data_ptr(), out.nbytes)


@functools.cache
def _spread_here() -> tuple[int, ...]:
    return spread_nodes()


def spread(address: int, nbytes: int, over: tuple[int, ...]) -> bool:
    """Deal the whole pages within [address, address + nbytes) out to nodes; whether the system did it.

    Where it does not (a sandbox that forbids mbind), one warning says so, and the pages lie where they are written.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    begin, end = -(-address // page) * page, (address + nbytes) // page * page
    if begin >= end:
        return True
    number = MBIND.get(platform.machine())
    if number is None or max(over) >= MOST_NODES:
        _refused(f"mbind is not known for {platform.machine()} and node {max(over)}", over)
        return False
    mask = (ctypes.c_ulong * (MOST_NODES // 64))()
    for node in over:
        mask[node // 64] |= 1 << node % 64
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    arguments = (
        begin,
        end - begin,
        INTERLEAVE,
        ctypes.addressof(mask),
        MOST_NODES + 1,
        0,
    )  # bits, and one: so the system counts
    if call(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)) == 0:
        return True
    _refused(os.strerror(ctypes.get_errno()), over)
    return False


@functools.cache
def _refused(reason: str, over: tuple[int, ...]) -> None:
    warnings.warn(
        f"weights could not be spread over the memory nodes {list(over)}: {reason}; they lie where they are packed, "
        "and threads of other nodes read them from there",
        stacklevel=4,
    )

"""How the paths with a producer share a processor's registers out: warp groups of 128 threads, in one program or two."""

from __future__ import annotations

from typing import Any

REGISTER_FILE, THREADS = 65536, 128  # of a processor; of a consumer, and of the producer


def programs(warps: int) -> int:
    """Programs that share a processor: one of two consumers, or two of one."""
    return 1 if warps == 8 else 2


def most_registers(groups: int, each: int = 1) -> int:
    """Of a thread, as the compiler is told: `groups` warp groups a program, and `each` programs."""
    return REGISTER_FILE // (THREADS * groups * each) // 8 * 8


def narrow_code(kernels: Any, narrow: str) -> int:
    """Tactic.narrow as a module of kernels calls it."""
    code: int = {"": kernels.WHOLE, "halves": kernels.HALVES, "quarters": kernels.QUARTERS}[narrow].value
    return code

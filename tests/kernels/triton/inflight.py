"""Read machine code: may a register be written while a wgmma that runs on still reads it?

A wgmma (HGMMA in SASS, QGMMA of e4m3) with its A operand in registers reads them after it was issued, until WARPGROUP.DEPBAR
says that at most N later groups run; `gsb0` ends a group. Every path from such an instruction is followed to
where it is retired.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

WIDTH = {".64": 2, ".128": 4, ".WIDE": 2, ".M88.4": 4, ".M88.2": 2}
READS_ONLY = (
    "ST",
    "RED",
    "BAR",
    "SYNCS",
    "BRA",
    "EXIT",
    "WARP",
    "LDGSTS",
    "ARRIVES",
    "BSYNC",
    "BSSY",
    "USETMAXREG",
)


@dataclass(frozen=True)
class Instruction:
    text: str
    a: frozenset[int]  # registers that a wgmma reads while it runs
    writes: frozenset[int]
    ends_group: bool
    leaves: int | None  # groups that a wait leaves running
    goes_to: int | None  # address
    falls_through: bool


def disassemble(cubin: bytes, at: Path) -> dict[int, Instruction]:
    """address -> instruction, in order."""
    at.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-sass", str(at)], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> dict[int, Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", text)
    return {int(address, 16): _instruction(body) for address, body in found}


def _instruction(body: str) -> Instruction:
    guarded = body.startswith("@")
    op, _, rest = re.sub(r"^@!?U?P[T\d]+\s+", "", body).partition(" ")
    operands = [o.strip() for o in rest.split(",")]
    first = re.match(r"R(\d+)", operands[0])
    writes: set[int] = set()
    a: set[int] = set()
    if op.startswith(("HGMMA", "QGMMA")):
        columns = re.match(r"[HQ]GMMA\.64x(\d+)", op)
        assert first is not None
        assert columns is not None
        writes = set(range(int(first[1]), int(first[1]) + int(columns[1]) // 2))
        if register := re.match(r"R(\d+)", operands[1]):
            a = set(range(int(register[1]), int(register[1]) + 4))
    elif first is not None and not op.startswith(READS_ONLY):
        width = max((n for mark, n in WIDTH.items() if mark in op), default=1)
        writes = set(range(int(first[1]), int(first[1]) + width))
    waits = re.search(r"gsb0, 0x([0-9a-f]+)", body) if op.startswith("WARPGROUP.DEPBAR") else None
    target = re.search(r"0x([0-9a-f]+)", body) if op.startswith("BRA") else None
    return Instruction(
        body, frozenset(a), frozenset(writes), "gsb0" in body and waits is None,
        int(waits[1], 16) if waits else None, int(target[1], 16) if target else None,
        guarded or not op.startswith(("EXIT", "BRA", "RET")),
    )  # fmt: skip


def overwritten(code: dict[int, Instruction]) -> list[str]:
    """What writes a register of a wgmma that may still run."""
    after = dict(zip(code, list(code)[1:], strict=False))
    bad = []
    for start, product in code.items():
        seen = set()
        todo = [(start, product.ends_group, 0)] if product.a else []
        while todo:
            at, committed, newer = todo.pop()
            here = code[at]
            for then in [here.goes_to] + [after.get(at)] * here.falls_through:
                if then not in code or (then, committed, newer) in seen:
                    continue
                seen.add((then, committed, newer))
                follower = code[then]
                if follower.leaves is not None and committed and follower.leaves <= newer:
                    continue  # retired
                if follower.writes & product.a:
                    bad.append(f"{product.text} runs while: {follower.text}")
                    continue
                ends = follower.ends_group
                todo.append((then, committed or ends, newer + (committed and ends)))
    return bad


def runs_on(code: dict[int, Instruction]) -> bool:
    """Whether some wait leaves products running, and none follows each product (serialised by ptxas)."""
    products = sum(bool(i.a) for i in code.values())
    waits = sum(i.leaves is not None for i in code.values())
    return any(i.leaves for i in code.values() if i.leaves is not None) and waits < products

"""Inline PTX on tensors: the few instructions with which the kernels take codes apart, one 32-bit register at a time.

A register is an int64 tensor of values 0 … 2^32 - 1. `run` follows Triton's rules for inline assembly: outputs are
$0 …, then come the registers of each input, and `pack` elements of 16 bits share one (of 32 bits: have one each).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

LINE = re.compile(r"([a-z][\w.]*)\s+([^;]+);")
OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")
MASK = 0xFFFFFFFF


def bf16(bits: torch.Tensor) -> torch.Tensor:
    """The float32 of 16 bits of a bfloat16."""
    return (
        ((bits & 0xFFFF) << 16)
        .to(torch.int64)
        .sub_((bits & 0x8000) << 17)
        .to(torch.int32)
        .view(torch.float32)
    )


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of floating values rounded to bfloat16."""
    return values.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bits_of(bf16(a) * bf16(b)) | bits_of(bf16(a >> 16) * bf16(b >> 16)) << 16


def _multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    def half(shift: int) -> torch.Tensor:
        exact = bf16(a >> shift).double() * bf16(b >> shift).double() + bf16(c >> shift).double()
        return bits_of(exact)

    return half(0) | half(16) << 16


def _permute(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    source = a | b << 32
    out = torch.zeros_like(source + selector)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source >> 8 * (nibble & 7) & 255
        out |= torch.where(nibble < 8, byte, (byte >> 7) * 255) << 8 * i  # from 8 on, its sign eight times
    return out


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    assert int(table) == 0xEA, "another function than (a & b) | c"
    return a & b | c


INSTRUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b & MASK,
    "shl.b32": lambda a, n: a << n & MASK,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "prmt.b32": _permute,
    "lop3.b32": _lop3,
    "mul.rn.bf16x2": _multiply,
    "fma.rn.bf16x2": _multiply_add,
}


def execute(text: str, registers: dict[str, torch.Tensor]) -> None:
    """Run instructions, which name their operands as they stand in `registers`, or give numbers."""
    for name, operands in LINE.findall(text):
        if name == "reg":
            continue
        to, *sources = (operand.strip() for operand in OPERAND.findall(operands))
        values = [_operand(s, registers) for s in sources]
        if to.startswith("{"):
            low, high = to[1:-1].split(",")
            registers[low.strip()], registers[high.strip()] = values[0] & 0xFFFF, values[0] >> 16
        else:
            registers[to] = INSTRUCTIONS[name](*values)


def _operand(text: str, registers: dict[str, torch.Tensor]) -> torch.Tensor:
    if text.startswith("{"):  # two halves of a register
        low, high = (registers[name.strip()] for name in text[1:-1].split(","))
        return low | high << 16
    return registers[text] if text in registers else torch.tensor(int(text, 0))


def run(
    text: str, inputs: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], pack: int
) -> list[torch.Tensor]:
    """The outputs of inline assembly, element by element of inputs of one shape."""
    inputs = torch.broadcast_tensors(*inputs)
    groups = [tensor.reshape(-1, pack) for tensor in inputs]
    registers: dict[str, torch.Tensor] = {}
    outputs = sum(pack if dtype.itemsize == 4 else 1 for dtype in dtypes)
    for group in groups:
        small = group.element_size() == 2
        for values in group.split(2, 1) if small else group.split(1, 1):
            registers[f"${outputs + len(registers)}"] = _joined(values)
    execute(text, registers)
    if outputs > len(dtypes):  # tensors of 32 bits, several elements at a time
        assert outputs == pack * len(dtypes), "outputs of 32 bits and of others"
        parts = [_parted(registers[f"${i}"], dtypes[i // pack], 1) for i in range(outputs)]
        return [torch.stack(parts[i : i + pack], 1).view(inputs[0].shape) for i in range(0, outputs, pack)]
    return [_parted(registers[f"${i}"], dtype, pack).view(inputs[0].shape) for i, dtype in enumerate(dtypes)]


def _joined(values: torch.Tensor) -> torch.Tensor:
    """int [G, 1 or 2] -> int64 [G], the first in the low bits."""
    if values.element_size() == 4:
        return values[:, 0].to(torch.int64) & MASK
    halves = values.view(torch.int16).to(torch.int64) & 0xFFFF
    return sum((halves[:, i] << 16 * i for i in range(halves.shape[1])), torch.zeros(1, dtype=torch.int64))


def _parted(register: torch.Tensor, dtype: torch.dtype, pack: int) -> torch.Tensor:
    if dtype.itemsize == 8:
        assert pack == 1
        return register.to(dtype)
    if dtype.itemsize == 4:
        assert pack == 1, "one register for several elements of 32 bits"
        return (register - ((register & 1 << 31) << 1)).to(torch.int32).view(dtype)
    if dtype.itemsize == 1:
        assert pack == 4, "a register of less than four bytes"
        return torch.stack([register >> 8 * i & 255 for i in range(4)], 1).to(torch.uint8).view(dtype)
    halves = torch.stack([register >> 16 * i & 0xFFFF for i in range(pack)], 1)
    return (halves - ((halves & 0x8000) << 1)).to(torch.int16).view(dtype)

"""The inline PTX that decodes weights on a GPU, evaluated here: the interpreter runs other operations in its place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from moestro.formats import NVFP4
from moestro.kernels.triton import layout
from moestro.kernels.triton.device import common as device

U32 = np.uint32
Registers = dict[str, np.ndarray]


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << 16).view(np.float32)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.rn.bf16x2; the products here are exact in float32."""
    halves = []
    for shift in (0, 16):
        product = torch.from_numpy(bf16(a >> shift & 0xFFFF) * bf16(b >> shift & 0xFFFF))
        halves.append(product.bfloat16().view(torch.int16).numpy().astype(np.uint16).astype(U32))
    return halves[0] | halves[1] << 16


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, choice, out = a.astype(np.uint64) | b.astype(np.uint64) << 32, int(selector), np.zeros_like(a)
    for i in range(4):
        byte = both >> np.uint64(8 * (choice >> 4 * i & 7)) & np.uint64(255)
        out |= byte.astype(U32) << U32(8 * i)
    return out


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mul.rn.bf16x2": multiply,
    "prmt.b32": permute,
}


def evaluate(function: Any, inputs: dict[str, np.ndarray]) -> Registers:
    """Run the one block of PTX in a kernel's source on 32-bit registers ($n are its operands)."""
    (text,) = re.findall(r'"""\{(.*?)\}"""', inspect.getsource(function.fn), re.DOTALL)
    registers = dict(inputs)
    size = len(next(iter(inputs.values())))

    def value(operand: str) -> np.ndarray:
        return registers[operand] if operand in registers else np.full(size, int(operand, 0), U32)

    for statement in filter(None, (s.strip() for s in text.split(";"))):
        if statement.startswith(".reg"):
            continue
        name, rest = statement.split(maxsplit=1)
        target, *operands = [o.strip() for o in re.split(r",(?![^{]*\})", rest)]
        halves = re.findall(r"\w+", target if target.startswith("{") else operands[0])
        if target.startswith("{"):  # a register's halves
            whole = value(operands[0])
            registers |= dict(zip(halves, (whole & 0xFFFF, whole >> 16), strict=True))
        elif operands[0].startswith("{"):
            registers[target] = value(halves[0]) | value(halves[1]) << 16
        elif name == "lop3.b32":  # table 0xEA: (a & b) | c
            a, b, c = map(value, operands[:3])
            assert operands[3] == "0xEA"
            registers[target] = a & b | c
        elif name == "prmt.b32":
            registers[target] = permute(value(operands[0]), value(operands[1]), U32(int(operands[2], 0)))
        else:
            registers[target] = OPERATIONS[name](*map(value, operands))
    return registers


def one_scale_a_register(pairs: np.ndarray, scale_words: np.ndarray) -> dict[str, np.ndarray]:
    scales = evaluate(device.unpack_scales, {"$4": scale_words})
    return evaluate(
        device.unpack_words, {"$4": pairs, **{f"${5 + 2 * i}": scales[f"${i}"] for i in range(4)}}
    )


def two_scales_a_register(pairs: np.ndarray, scale_words: np.ndarray) -> dict[str, np.ndarray]:
    scales = evaluate(device.unpack_scale_pairs, {"$2": scale_words})
    return evaluate(device.unpack_words_of_pairs, {"$4": pairs, "$5": scales["$0"], "$7": scales["$1"]})


@pytest.mark.parametrize("decode", [one_scale_a_register, two_scales_a_register])
def test_every_code_under_every_scale_decodes_to_its_value(
    decode: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
) -> None:
    """e2m1 · e4m3 · 2^-8, subnormal scales included, exactly; four planes of a word, two words of a register."""
    bytes_ = torch.arange(1, 127, dtype=torch.uint8)  # 0 has no codes, 127 is NaN
    codes = torch.arange(16, dtype=torch.uint8)
    packed = codes[0::2] | codes[1::2] << 4
    empty = torch.empty(64, 4 * len(bytes_), dtype=torch.float8_e4m3fn)
    q = NVFP4(packed.repeat(64, 4 * len(bytes_)), empty, torch.ones(()))
    q.scale.view(torch.uint8)[:] = bytes_.roll(1).repeat(4)  # neighbours differ
    t = layout.TritonNVFP4.pack(NVFP4(q.packed[None], q.scale[None], q.global_scale[None]), gated=False)
    words = t.words.numpy().view(np.uint16).reshape(-1, 8, 2).astype(U32)  # [blocks of 64 rows, pairs, 2]
    pairs = (words[..., 0] | words[..., 1] << 16).reshape(-1)
    scale_words = np.repeat(t.scales.numpy().view(U32).reshape(-1), 8)
    found = decode(pairs, scale_words)
    planes = np.stack(
        [np.stack([bf16(found[f"${i}"] & 0xFFFF), bf16(found[f"${i}"] >> 16)], -1) for i in range(4)]
    )
    dense = (
        q.dequantize(torch.float32).numpy().reshape(64, -1, 4, 16) / layout.RESIDUAL
    )  # [row, block, plane, column]
    expected = dense.transpose(2, 1, 0, 3).reshape(4, -1)
    assert np.array_equal(planes.reshape(4, -1), expected)

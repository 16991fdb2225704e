"""Compile the kernels of push.py for a GPU that is not there: `python compile_push.py 90`. Prints their names."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moestro.parallel import push

CONSTANTS = {"H": 7168, "K": 8, "K2": 8, "BLOCK": 1024, "R": 2, "FP8": False}
POINTERS = {
    "x": "*bf16", "out": "*bf16", "ids": "*i32", "weights": "*fp32", "table": "*i32", "local": "*i32",
    "row_buffers": "*i64", "id_buffers": "*i64", "weight_buffers": "*i64", "result_buffers": "*i64",
    "codes": "*fp8e4nv", "rows": "*bf16", "own_weights": "*fp32",
}  # fmt: skip


def compile_one(name: str, **changes: object) -> None:
    kernel = getattr(push, name)
    constants = {k: v for k, v in {**CONSTANTS, **changes}.items() if k in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else POINTERS.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {})
    ptx = triton.compile(
        source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4}
    ).asm["ptx"]
    print(name, ptx.count("st.global"), ptx.count("ld.global"))


compile_one("pull_sums")
compile_one("push_rows")
compile_one("push_rows", FP8=True, BLOCK=8192)
compile_one("unpack_rows")

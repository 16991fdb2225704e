"""Compile the kernels of push.py for a GPU that is not there: `python compile_push.py 90`. Prints their names."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moestro.parallel import push

CONSTANTS = {"H": 7168, "K": 8, "K2": 8, "BLOCK": 1024, "R": 2}
POINTERS = {
    "x": "*bf16", "out": "*bf16", "ids": "*i32", "weights": "*fp32", "table": "*i32", "local": "*i32",
    "row_buffers": "*i64", "id_buffers": "*i64", "weight_buffers": "*i64", "result_buffers": "*i64",
}  # fmt: skip

for name in push.__all__:
    kernel = getattr(push, name)
    constants = {k: v for k, v in CONSTANTS.items() if k in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else POINTERS.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {})
    ptx = triton.compile(
        source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4}
    ).asm["ptx"]
    print(name, ptx.count("st.global"), ptx.count("ld.global"))

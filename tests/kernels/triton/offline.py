"""Compile a Launch for a GPU that is not there, as Triton's launcher would specialise it.

Run as a program (`python offline.py sm_90 ...`), since the test process interprets the kernels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.formats import BF16, MXFP4, NVFP4, FP8Block
from moestro.kernels.activations import Activation, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import TritonRunner
from moestro.kernels.triton.call import Launch

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


def compile_launch(launch: Launch, capability: int = 90) -> Any:
    """The compiled kernel."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in launch.meta:
            signature[name], constants[i,] = "constexpr", launch.meta[name]
        elif launch.kernel.params[i].do_not_specialize and isinstance(values[name], int):
            signature[name] = "i32"
        else:
            signature[name] = _specialised(values[name], (i,), constants, attrs)
    options = {k: v for k, v in launch.meta.items() if k in OPTIONS}
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(launch.kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _specialised(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attrs: dict[Any, Any]) -> Any:
    """The type of an argument, or of all in a group; what is known of it goes into constants and attrs."""
    if isinstance(value, tuple):
        parts = [_specialised(v, (*path, i), constants, attrs) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    if isinstance(value, GluonDescriptor):
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attrs[path] = [["tt.divisibility", 16]]
    return f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"


def runner_of(
    experts: int, top_k: int, hidden: int, intermediate: int, weight_format: str,
    activation: Activation | None = None, biases: bool = False, input_format: str | None = None, ranks: int = 1,
) -> TritonRunner:  # fmt: skip
    """A runner on zeros of these sizes: the first of so many ranks, each with as many experts."""
    act = activation or SwiGLU()
    rows = intermediate * (2 if act.gated else 1)
    gate_up: Any = zeros(weight_format, experts, rows, hidden)
    down: Any = zeros(weight_format, experts, hidden, intermediate)
    fields = {
        "gate_up_bias": torch.zeros(experts, rows) if biases else None,
        "down_bias": torch.zeros(experts, hidden) if biases else None,
        "gate_up_input_scale": None,
        "down_input_scale": None,
    }
    p = MoeProblem(experts * ranks, experts, 0, top_k, hidden, intermediate, weight_format, act, input_format,
                   torch.bfloat16, "cuda")  # fmt: skip
    g, d = TritonRunner.prepare(p, SimpleNamespace(gate_up=gate_up, down=down, **fields))
    return TritonRunner(p, SimpleNamespace(gate_up=g, down=d, **fields))


def zeros(weight_format: str, experts: int, rows: int, columns: int) -> Any:
    """Weights of a format."""
    packed = torch.zeros(experts, rows, columns // 2, dtype=torch.uint8)
    data = torch.zeros(experts, rows, columns, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if weight_format == "nvfp4":
        return NVFP4(packed, data[..., : columns // 16].contiguous(), torch.ones(experts))
    if weight_format == "mxfp4":
        return MXFP4(packed, packed[..., : columns // 32].contiguous())
    if weight_format == "mxfp8":
        from moestro.formats import MXFP8  # see int4

        return MXFP8(data, packed[..., : columns // 32].contiguous())
    if weight_format == "fp8_block":
        return FP8Block(data, torch.ones(experts, -(-rows // 128), -(-columns // 128)))
    if weight_format == "int4":
        from moestro.formats import INT4  # benchmarks/same_kernels.py runs this with older trees, too

        return INT4.of(packed, torch.zeros(experts, rows, columns // 32, dtype=torch.bfloat16))
    return BF16(torch.zeros(experts, rows, columns, dtype=torch.bfloat16))


def inputs_of(runner: TritonRunner, num_tokens: int) -> list[torch.Tensor]:
    p = runner.problem
    x = torch.zeros(num_tokens, p.hidden_size, dtype=torch.bfloat16)
    ids = torch.zeros(num_tokens, p.top_k, dtype=torch.int32)
    return [x, ids, torch.zeros(num_tokens, p.top_k), torch.zeros_like(x)]

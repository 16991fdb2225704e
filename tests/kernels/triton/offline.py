"""Compile a Launch for a GPU that is not there, as Triton's launcher would specialise it.

Run as a program (`python offline.py sm_90 ...`), since the test process interprets the kernels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from moestro.kernels.triton.plan import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.formats import BF16, NVFP4
from moestro.kernels.activations import Activation, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import TritonRunner

TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


def compile_launch(launch: Launch, capability: int = 90) -> Any:
    """The compiled kernel."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    constants = {k: v for k, v in launch.meta.items() if k in names}
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
            continue
        elif launch.kernel.params[i].do_not_specialize:
            signature[name] = "i32"
            continue
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32"
            if value % 16:
                continue
        attrs[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.meta.items() if k in OPTIONS}
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(launch.kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def runner_of(
    experts: int, top_k: int, hidden: int, intermediate: int, weight_format: str,
    activation: Activation | None = None, biases: bool = False, input_format: str | None = None,
) -> TritonRunner:  # fmt: skip
    """A runner on zeros of these sizes."""
    act = activation or SwiGLU()
    rows = intermediate * (2 if act.gated else 1)
    if weight_format == "nvfp4":
        gate_up: Any = _nvfp4(experts, rows, hidden)
        down: Any = _nvfp4(experts, hidden, intermediate)
    else:
        gate_up = BF16(torch.zeros(experts, rows, hidden, dtype=torch.bfloat16))
        down = BF16(torch.zeros(experts, hidden, intermediate, dtype=torch.bfloat16))
    fields = {
        "gate_up_bias": torch.zeros(experts, rows) if biases else None,
        "down_bias": torch.zeros(experts, hidden) if biases else None,
        "gate_up_input_scale": None,
        "down_input_scale": None,
    }
    p = MoeProblem(experts, experts, 0, top_k, hidden, intermediate, weight_format, act, input_format,
                   torch.bfloat16, "cuda")  # fmt: skip
    g, d = TritonRunner.prepare(p, SimpleNamespace(gate_up=gate_up, down=down, **fields))
    return TritonRunner(p, SimpleNamespace(gate_up=g, down=d, **fields))


def _nvfp4(experts: int, rows: int, columns: int) -> NVFP4:
    packed = torch.zeros(experts, rows, columns // 2, dtype=torch.uint8)
    scale = torch.zeros(experts, rows, columns // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return NVFP4(packed, scale, torch.ones(experts))


def inputs_of(runner: TritonRunner, num_tokens: int) -> list[torch.Tensor]:
    p = runner.problem
    x = torch.zeros(num_tokens, p.hidden_size, dtype=torch.bfloat16)
    ids = torch.zeros(num_tokens, p.top_k, dtype=torch.int32)
    return [x, ids, torch.zeros(num_tokens, p.top_k), torch.zeros_like(x)]

"""The ways to multiply, one module each; a new one is a file here, its kernels in device/, and its name in PATHS.

A path is a module with (path.py's Path is the Protocol that mypy holds them to):

    NAME: str                                  # what Tactic.path says
    TABLE: Mapping[str, tuple[Tactic, ...]]    # what is worth racing, by kind of problem (path.kind_of):
                                               # "packed", "dense" weights with activations as they are,
                                               # else the input_format: "nvfp4", "fp8"; "rounded": rows that
                                               # are rounded to e4m3 and multiplied as bfloat16
    fitted(problem, tactic) -> Tactic          # the tactic with steps and stages that suit these sizes
    why_not(problem, tactic, num_tokens) -> str | None       # why it cannot run; general limits are choose.why_not's
    shared_bytes(problem, tactic, stage) -> int              # of the pipeline of product 1 or 2
    cost(problem, tactic, num_tokens) -> float               # estimated seconds, for the order of candidates
    scratch(problem, num_tokens, tactic, x_rows) -> Plan     # the workspace: call.scratch, and what else it needs
    launch(call) -> None                       # add all launches of the call, in order

`launch` is mostly `call.two_products(product)`, where product(call, stage, rows, out) adds one product: `rows` is
Rows(data, scale or None), `out` the scratch tensor "act" (stage 1, by place or pair) or "partial" (stage 2, by pair).
The groups of kernel arguments come from the call: routing(stage) -> (Routing, stride), weights_of(stage) -> Weights,
size(stage) -> Size, product(stage) -> Product (a constexpr). Groups are in device/arguments.py; a group holds only what
is the same in all calls of a layer (Triton specialises every integer in it).

Weights come packed (fp8_layout.packed_type(problem), `call.packed(stage)`) unless they are dense. A path that quantises
activations by itself replaces `call.two_products` by its own steps between call.sort() and call.sum_pairs(); kinds that
no TABLE names are refused by runner.why_not.
"""

from __future__ import annotations

from moestro.kernels.triton.paths import (
    chain,
    dense,
    dequantized,
    fp4,
    fp8,
    fp8_cuda,
    fp8_mx,
    fp8_once,
    fp8_once_cuda,
    fused,
    warp_specialized,
)
from moestro.kernels.triton.paths.path import Path, kind_of

PATHS: dict[str, Path] = {
    path.NAME: path
    for path in (
        fused,
        chain,
        warp_specialized,
        dense,
        dequantized,
        fp4,
        fp8_cuda,
        fp8,
        fp8_once,
        fp8_once_cuda,
        fp8_mx,
    )
}

__all__ = ["PATHS", "Path", "kind_of"]

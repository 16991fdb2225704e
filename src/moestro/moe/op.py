"""moestro.fused_moe, and the torch operators behind it: whole under torch.compile(fullgraph=True).

Called eagerly, fused_moe goes straight to a backend. Under torch.compile, and where autograd is recording, it
is the operator moestro::fused_moe (moestro::fused_moe_out with out=), whose arguments are tensors and two
strings: how the weights' tensors belong together, and the options. The operators have no derivative: backward
raises.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import astuple
from typing import Any

import torch

from moestro.errors import BackendError, DTypeError, FormatError
from moestro.formats import NVFP4
from moestro.kernels.activations import CLASSES, Activation, form_of
from moestro.moe import flat
from moestro.moe.checks import Limits, check_call, check_id_range, result_dtype
from moestro.moe.operation import Operation, as_inputs
from moestro.moe.options import Options, known_num_experts, make_problem
from moestro.moe.weights import ExpertWeights

LAYER_END = " :: "  # between what identifies a layer and its options


def fused_moe(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    *,
    activation: str | Activation = "silu",
    input_format: str | None = None,
    expert_offset: int = 0,
    deterministic: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    tactic: Any = None,
    num_experts: int | None = None,
) -> torch.Tensor:
    """y[n] = Σ_k weights[n, k] · expert(ids[n, k])(x[n]), summed in float32, rounded once to x's dtype.

    x: [N, H] bf16, fp16 or fp32, or formats.NVFP4 of [N, H] (quantised activations: input_format="nvfp4" is
    implied, and the result is bf16). ids: int32 or int64 [N, K], global expert ids. weights: float32 [N, K].
    w: the experts expert_offset .. expert_offset + L. Pairs of other experts contribute nothing.

    activation: "silu", "gelu_tanh", "relu2" (no gate) or an Activation such as SwiGLU(alpha=, limit=).
    input_format: x and the intermediate are quantised too: "nvfp4" (W4A4), "fp8" (e4m3 per token) or "int8" (per 32
    columns); docs/numerics.md has the definitions.
    deterministic: the same bits each time. batch_invariant: a token's result has the same bits whatever N, its place,
    the other tokens and their routing. out: where to write, [N, H] in x's dtype, not overlapping x.
    backend: "auto", "triton", "cpu" or "portable". tactic: one of the backend's; None lets the tuner choose.
    num_experts: E; by default those of w, and unknown with an expert_offset.

    A backend that wants weights in its kernel layout repacks those of the checkpoint layout at the first
    call, and the copy stays with `w`; w.prepare() beforehand, as FusedMoE does, keeps one.

    Raises ShapeError, DTypeError, DeviceError, FormatError, RoutingError or BackendError, naming the
    argument, before any work. Safe to call from several threads.
    """
    if not isinstance(w, ExpertWeights):
        raise DTypeError(f"w must be a moestro.ExpertWeights, got {type(w).__name__}")
    if isinstance(x, NVFP4):
        if input_format not in (None, "nvfp4"):
            raise FormatError(f"input_format must be None or 'nvfp4' for an NVFP4 x, got {input_format!r}")
        input_format = "nvfp4"
    options = (
        activation, input_format, expert_offset, deterministic, batch_invariant, backend, tactic, num_experts,
    )  # fmt: skip
    if torch.compiler.is_compiling() or records_gradients(x, weights):
        return call_operator(x, ids, weights, w, options_text(options), out)
    return _run(x, ids, weights, w, options, out)


def records_gradients(x: torch.Tensor | NVFP4, weights: torch.Tensor) -> bool:
    """Whether autograd would expect a derivative of this call."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in (x, weights))


def _run(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    options: tuple[Any, ...],
    out: torch.Tensor | None,
) -> torch.Tensor:
    operation = w.operations.get(_key(x, ids, options))
    if operation is None:
        operation = _make_operation(x, ids, weights, w, options)
    check_call(operation.limits, x, ids, weights, out)
    check_id_range(ids, operation.limits.num_experts)
    if out is None:
        out = torch.empty(x.shape, dtype=result_dtype(x), device=w.device)
    if x.shape[0] == 0:
        return out
    inputs = as_inputs(x, ids, weights, out)
    runner, tactic = operation.pick(inputs)
    runner.forward(inputs, tactic)
    return out


def _key(x: Any, ids: Any, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What an operation is remembered by; None for arguments so wrong that there is none."""
    try:
        key = (options, ids.shape[1], x.dtype if isinstance(x, torch.Tensor) else NVFP4)
        hash(key)
    except (AttributeError, IndexError, TypeError):
        return None
    return key


def _make_operation(x: Any, ids: Any, weights: Any, w: ExpertWeights, options: tuple[Any, ...]) -> Operation:
    """The operation for these arguments, once they and the options are found to fit."""
    fields = Options(*options)
    limits = Limits(w.hidden_size, w.device, known_num_experts(fields, w))
    check_call(limits, x, ids, weights)
    problem = make_problem(w, fields, top_k=ids.shape[1], dtype=result_dtype(x))
    operation = Operation(
        w,
        problem,
        limits,
        backend=fields.backend,
        tactic=fields.tactic,
        quantized_input=isinstance(x, NVFP4),
    )
    w.operations[_key(x, ids, options)] = operation
    return operation


# --- the operators ---------------------------------------------------------------------------------------


def split_x(x: torch.Tensor | NVFP4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x, or its packed codes and its scales."""
    return (x.packed, [x.scale, x.global_scale]) if isinstance(x, NVFP4) else (x, [])


def join_x(x: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor | NVFP4:
    """What split_x took apart."""
    return NVFP4(x, *scales) if scales else x


def result_like(x: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
    """An uninitialised result for split_x's pieces."""
    return x.new_empty((x.shape[0], x.shape[1] * 2), dtype=torch.bfloat16) if scales else torch.empty_like(x)


def options_text(options: tuple[Any, ...]) -> str:
    """The options as a string that `options_of` reads. BackendError for what has no such form."""
    activation, *rest = options
    if not isinstance(activation, str):
        if form_of(activation) is None:
            raise BackendError(f"activation must be one of moestro's under torch.compile, got {activation!r}")
        activation = (type(activation).__name__, *astuple(activation))
    return repr((activation, *rest))


@functools.lru_cache(maxsize=256)
def options_of(text: str) -> tuple[Any, ...]:
    """The options that options_text or layer_text wrote."""
    activation, *rest = ast.literal_eval(text.rpartition(LAYER_END)[2])
    return (CLASSES[activation[0]](*activation[1:]) if isinstance(activation, tuple) else activation, *rest)


def layer_text(options: Options, top_k: int, max_num_tokens: int, use_cuda_graph: bool) -> str:
    """The same of a layer: what tells it from other layers on the same weights, then its options."""
    fields = tuple(vars(options).values())
    try:
        text = options_text(fields)
    except BackendError:
        text = repr(fields)  # found again while the layer lives, but not to be read back
    return f"layer {top_k} {max_num_tokens} {use_cuda_graph}{LAYER_END}{text}"


def call_operator(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    options: str,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """The call as the torch operator, with options_text or layer_text."""
    data, scales = split_x(x)
    args = (data, scales, ids, weights, w.tensors, w.spec, options)
    if out is None:
        result: torch.Tensor = torch.ops.moestro.fused_moe(*args)
        return result
    torch.ops.moestro.fused_moe_out(*args, out)
    return out


def _run_operator(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tensors: list[torch.Tensor],
    spec: str,
    options: str,
    out: torch.Tensor | None,
) -> torch.Tensor:
    w = weights_of(tensors, spec)
    layer = flat.live(tensors, options) if LAYER_END in options else None
    if layer is not None and layer.weights is w:
        result: torch.Tensor = layer.run(x, ids, weights, out, owned=False)
        return result
    return _run(x, ids, weights, w, options_of(options), out)


def weights_of(tensors: list[torch.Tensor], spec: str) -> ExpertWeights:
    """The weights that these tensors belong to: the live object, or a new one."""
    held: ExpertWeights | None = flat.live(tensors, spec)
    if held is not None and all(a is b for a, b in zip(held.tensors, tensors, strict=True)):
        return held
    made: ExpertWeights = flat.unflatten(tensors, spec)
    return made


@torch.library.custom_op("moestro::fused_moe", mutates_args=())
def _fused_moe_op(
    x: torch.Tensor,
    scales: list[torch.Tensor],
    ids: torch.Tensor,
    weights: torch.Tensor,
    tensors: list[torch.Tensor],
    spec: str,
    options: str,
) -> torch.Tensor:
    return _run_operator(join_x(x, scales), ids, weights, tensors, spec, options, None)


@_fused_moe_op.register_fake
def _fused_moe_fake(x: torch.Tensor, scales: list[torch.Tensor], *_: Any) -> torch.Tensor:
    return result_like(x, scales)


@torch.library.custom_op("moestro::fused_moe_out", mutates_args=("out",))
def _fused_moe_out_op(
    x: torch.Tensor,
    scales: list[torch.Tensor],
    ids: torch.Tensor,
    weights: torch.Tensor,
    tensors: list[torch.Tensor],
    spec: str,
    options: str,
    out: torch.Tensor,
) -> None:
    _run_operator(join_x(x, scales), ids, weights, tensors, spec, options, out)


@_fused_moe_out_op.register_fake
def _fused_moe_out_fake(*_: Any) -> None:
    return None

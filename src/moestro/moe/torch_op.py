"""The torch operators moestro::fused_moe and moestro::fused_moe_out: whole under torch.compile(fullgraph=True).

Their arguments are tensors and two strings: how the weights' tensors belong together (flat.py), and the options as
plain values; a layer's has before it what tells it from other layers on the same weights. moestro::fused_moe has a
derivative in x and the routing weights (gradients.py).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import torch

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.kernels.activations import CLASSES, form_of
from moestro.moe import call, flat, gradients
from moestro.moe.options import Options
from moestro.moe.weights import ExpertWeights
from moestro.tuning.spec.plain_json import from_json, to_json

LAYER_END = " :: "  # between what identifies a layer and its options


class FlatCall(NamedTuple):
    """An operator's arguments; SCHEMA has them in this order."""

    x: torch.Tensor  # or its packed codes
    scales: list[torch.Tensor]  # of packed codes; empty for a plain x
    ids: torch.Tensor
    weights: torch.Tensor
    tensors: list[torch.Tensor]  # the experts'
    spec: str
    options: str

    @classmethod
    def of(
        cls, x: torch.Tensor | NVFP4, ids: torch.Tensor, weights: torch.Tensor, w: ExpertWeights, options: str
    ) -> Self:
        """A call with options_text or layer_text."""
        data, scales = (x.packed, [x.scale, x.global_scale]) if isinstance(x, NVFP4) else (x, [])
        return cls(data, scales, ids, weights, w.tensors, w.spec, options)

    @property
    def whole_x(self) -> torch.Tensor | NVFP4:
        """x as the caller gave it."""
        return NVFP4(self.x, *self.scales) if self.scales else self.x

    @property
    def result(self) -> torch.Tensor:
        """An uninitialised result."""
        x = self.x
        return (
            x.new_empty((x.shape[0], x.shape[1] * 2), dtype=torch.bfloat16)
            if self.scales
            else torch.empty_like(x)
        )


SCHEMA = "Tensor x, Tensor[] scales, Tensor ids, Tensor weights, Tensor[] tensors, str spec, str options"


def options_text(options: tuple[Any, ...]) -> str:
    """Options' fields in order as a string that `options_of` reads. BackendError for what has no such form."""
    activation, *rest = options
    if not isinstance(activation, str):
        if form_of(activation) is None:
            raise BackendError(f"activation must be one of moestro's under torch.compile, got {activation!r}")
        activation = (type(activation).__name__, *dataclasses.astuple(activation))
    try:
        return repr([to_json(value) for value in (activation, *rest)])  # Dynamo traces no json.dumps
    except TypeError as error:
        raise BackendError(f"options must be plain values under torch.compile: {error}") from None


@functools.lru_cache(maxsize=256)
def options_of(text: str) -> tuple[Any, ...]:
    """The options that options_text or layer_text wrote."""
    activation, *rest = (from_json(value) for value in ast.literal_eval(text.rpartition(LAYER_END)[2]))
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
    args = FlatCall.of(x, ids, weights, w, options)
    if out is None:
        result: torch.Tensor = torch.ops.moestro.fused_moe(*args)
        return result
    torch.ops.moestro.fused_moe_out(*args, out)
    return out


def recorded(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    out: torch.Tensor | None,
    options: str,
) -> torch.Tensor:
    """The call as autograd is to see it: with a derivative in x and weights, and none in the experts' own.

    BackendError with an out=, which can have none.
    """
    if out is not None:
        raise BackendError(
            "out must be None where x, weights or the experts want a gradient; call under torch.no_grad()"
        )
    return gradients.refuse(call_operator(x, ids, weights, w, options, None), w)


def _run_operator(flat_call: FlatCall, out: torch.Tensor | None) -> torch.Tensor:
    x, (_, _, ids, weights, tensors, spec, options) = flat_call.whole_x, flat_call
    w = weights_of(tensors, spec)
    layer = flat.live(tensors, options) if LAYER_END in options else None
    if layer is not None and layer.weights is w:
        result: torch.Tensor = layer.run(x, ids, weights, out, owned=False)
        return result
    return call.run(x, ids, weights, w, options_of(options), out)


def weights_of(tensors: list[torch.Tensor], spec: str) -> ExpertWeights:
    """The weights that these tensors belong to: the live object, or a new one."""
    held: ExpertWeights | None = flat.live(tensors, spec)
    if held is not None and all(a is b for a, b in zip(held.tensors, tensors, strict=True)):
        return held
    made: ExpertWeights = flat.unflatten(tensors, spec)
    return made


@torch.library.custom_op("moestro::fused_moe", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def _fused_moe_op(*args: Any) -> torch.Tensor:
    return _run_operator(FlatCall(*args), None)


@_fused_moe_op.register_fake
def _fused_moe_fake(*args: Any) -> torch.Tensor:
    return FlatCall(*args).result


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scales, ids, weights, *ctx.rest = inputs
    ctx.save_for_backward(x, ids, weights, *scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, ids, weights, *scales = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise BackendError("moestro.fused_moe has no second derivative (create_graph=True)")
    args = (grad.contiguous(), *FlatCall(x, scales, ids, weights, *ctx.rest))
    traced = torch.compiler.is_compiling() or type(grad) is not torch.Tensor
    of_x, of_weights = torch.ops.moestro.fused_moe_backward(*args) if traced else _gradients(*args)
    none = [None] * len(scales)
    return None if scales else of_x, none, None, of_weights, [None] * len(ctx.rest[0]), None, None


_fused_moe_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "moestro::fused_moe_backward", mutates_args=(), schema=f"(Tensor grad, {SCHEMA}) -> (Tensor, Tensor)"
)
def _fused_moe_backward_op(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Below an operator autograd is off in its thread; in another it is not.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_gradients, *args).result()


def _gradients(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    flat_call = FlatCall(*args)
    _, _, ids, weights, tensors, spec, options = flat_call
    w = weights_of(tensors, spec)
    with torch.inference_mode(False), torch.no_grad():
        return gradients.backward(grad, flat_call.whole_x, ids, weights, w, Options(*options_of(options)))


@_fused_moe_backward_op.register_fake
def _fused_moe_backward_fake(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    flat_call = FlatCall(*args)
    return flat_call.result, torch.empty_like(flat_call.weights)


@torch.library.custom_op(
    "moestro::fused_moe_out", mutates_args=("out",), schema=f"({SCHEMA}, Tensor(a!) out) -> ()"
)
def _fused_moe_out_op(*args: Any) -> None:
    *given, out = args
    _run_operator(FlatCall(*given), out)


@_fused_moe_out_op.register_fake
def _fused_moe_out_fake(*_: Any) -> None:
    return None

"""The checks of one call: a few attribute comparisons when all is well, and a full account when it is not.

Nothing here reads a tensor's values, so nothing waits for the device; `check_id_range` does, and runs only
inside `moestro.debug_checks()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NoReturn

import torch

from moestro.errors import (
    BackendError,
    DeviceError,
    DTypeError,
    FormatError,
    RoutingError,
    ShapeError,
    unknown_name,
)
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.problem import INPUT_FORMATS

X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)

_debug: ContextVar[bool] = ContextVar("moestro_debug_checks", default=False)


@contextmanager
def debug_checks() -> Iterator[None]:
    """Inside, every call checks that 0 <= ids < E, and raises RoutingError where not. Waits for the device.

    E is `num_experts=`, or where that is not given the experts of the weights (with expert_offset=0).
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, debug_checks() is off: for calls whose ids are ours, padding included."""
    token = _debug.set(False)
    try:
        yield
    finally:
        _debug.reset(token)


debugging = _debug.get  # whether this call is inside debug_checks()


@dataclass(frozen=True)
class Limits:
    """What every call must agree with."""

    hidden_size: int
    device: torch.device
    num_experts: int | None  # E, None: unknown
    top_k: int | None = None  # None: any
    max_num_tokens: int | None = None  # None: any


def check_call(
    limits: Limits,
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None = None,
) -> None:
    """Raise the error that fits unless x [N, H], ids [N, K], weights [N, K] and out [N, H] fit the limits.

    ShapeError for ranks, sizes, tensors that are not contiguous, or out overlapping x; DTypeError unless x is
    bf16, fp16 or fp32 (or NVFP4), ids int32 or int64, weights float32, and out of the result's dtype;
    DeviceError for a tensor elsewhere than the weights; RoutingError for more experts a token than there are.
    """
    try:
        piece = x.packed if isinstance(x, NVFP4) else x
        num_tokens, hidden = x.shape
        top_k = ids.shape[1]
        fine = (
            hidden == limits.hidden_size
            and (isinstance(x, NVFP4) or x.dtype in X_DTYPES)
            and ids.dtype in ID_DTYPES
            and weights.dtype == torch.float32
            and ids.shape == weights.shape
            and len(ids.shape) == 2
            and ids.shape[0] == num_tokens
            and piece.device == limits.device
            and ids.device == limits.device
            and weights.device == limits.device
            and piece.is_contiguous()
            and (not isinstance(x, NVFP4) or x.scale.is_contiguous())
            and ids.is_contiguous()
            and weights.is_contiguous()
            and top_k == (limits.top_k or top_k)
            and top_k > 0
            and (limits.num_experts is None or top_k <= limits.num_experts)
            and (limits.max_num_tokens is None or num_tokens <= limits.max_num_tokens)
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        fine = False
    if not fine:
        _explain(limits, x, ids, weights)
    if out is not None:
        check_out(x, out, ids=ids, weights=weights)


def result_dtype(x: torch.Tensor | NVFP4) -> torch.dtype:
    """x's dtype; bf16 for NVFP4."""
    return torch.bfloat16 if isinstance(x, NVFP4) else x.dtype


def check_out(x: torch.Tensor | NVFP4, out: torch.Tensor, **read: torch.Tensor) -> None:
    """Raise unless the result can be written to `out`; read: other tensors that the call reads, by name."""
    _require_tensor("out", out)
    piece = x.packed if isinstance(x, NVFP4) else x
    if tuple(out.shape) != tuple(x.shape):
        raise ShapeError(f"out must have x's shape {list(x.shape)}, got {list(out.shape)}")
    if out.dtype != result_dtype(x):
        raise DTypeError(f"out must be {result_dtype(x)}, got {out.dtype}")
    if out.device != piece.device:
        raise DeviceError(f"out must be on {piece.device}, where x is, got {out.device}")
    if not out.is_contiguous():
        raise ShapeError(f"out must be contiguous, got strides {out.stride()}")
    if not torch.compiler.is_compiling() and overlap(out, piece):
        raise ShapeError(
            "out must not overlap x, whose rows are still read when the first results are written"
        )
    for name, tensor in read.items():
        if not torch.compiler.is_compiling() and overlap(out, tensor):
            raise ShapeError(f"out must not overlap {name}, which are still read when it is written")
    if out.requires_grad and torch.is_grad_enabled():
        raise BackendError("out must not want a gradient: what is written there has none; pass out.detach()")


def check_id_range(ids: torch.Tensor, num_experts: int | None) -> None:
    """Raise RoutingError unless 0 <= ids < num_experts (None: no upper bound). Waits for the device."""
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or (num_experts is not None and high >= num_experts):
        bound = "" if num_experts is None else f" and below num_experts={num_experts}"
        raise RoutingError(f"ids must be at least 0{bound}, got values from {low} to {high}")


def overlap(a: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether a contiguous tensor shares memory with one of others."""
    first = a.data_ptr()
    end = first + a.nbytes
    for other in others:
        start = other.data_ptr()
        if first < start + other.nbytes and start < end:
            return True
    return False


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise DTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _explain(limits: Limits, x: torch.Tensor | NVFP4, ids: torch.Tensor, weights: torch.Tensor) -> NoReturn:
    """Find what is wrong, and raise it."""
    if not isinstance(x, NVFP4):
        _require_tensor("x", x)
    _require_tensor("ids", ids)
    _require_tensor("weights", weights)
    _explain_dtypes(x, ids, weights)
    _explain_shapes(limits, x, ids, weights)
    parts = {"x.packed": x.packed, "x.scale": x.scale} if isinstance(x, NVFP4) else {"x": x}
    pieces = {**parts, "ids": ids, "weights": weights}
    for name, tensor in pieces.items():
        if tensor.device != limits.device:
            raise DeviceError(
                f"{name} must be on {limits.device}, where the experts' weights are, got {tensor.device}"
            )
    for name, tensor in pieces.items():
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{name} must be contiguous, got shape {list(tensor.shape)} with strides {tensor.stride()}; "
                f"pass {name}.contiguous()"
            )
    raise AssertionError("a check failed that has no explanation")


def _explain_dtypes(x: torch.Tensor | NVFP4, ids: torch.Tensor, weights: torch.Tensor) -> None:
    if not isinstance(x, NVFP4) and x.dtype not in X_DTYPES:
        raise DTypeError(f"x must be torch.bfloat16, torch.float16 or torch.float32, got {x.dtype}")
    if ids.dtype not in ID_DTYPES:
        raise DTypeError(f"ids must be torch.int32 or torch.int64, got {ids.dtype}")
    if weights.dtype != torch.float32:
        raise DTypeError(
            f"weights must be torch.float32 (the sums are in float32), got {weights.dtype}; "
            "pass weights.float()"
        )


def _explain_shapes(
    limits: Limits, x: torch.Tensor | NVFP4, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    if len(x.shape) != 2 or x.shape[1] != limits.hidden_size:
        raise ShapeError(f"x must be [N, H] with H={limits.hidden_size}, got {list(x.shape)}")
    num_tokens = x.shape[0]
    if ids.ndim != 2 or ids.shape[0] != num_tokens:
        raise ShapeError(f"ids must be [N, K] with N={num_tokens} as in x, got {list(ids.shape)}")
    if weights.shape != ids.shape:
        raise ShapeError(f"weights must have ids' shape {list(ids.shape)}, got {list(weights.shape)}")
    top_k = ids.shape[1]
    if top_k < 1:
        raise RoutingError(f"ids must have at least one expert a token (top_k >= 1), got {list(ids.shape)}")
    check_top_k(top_k, limits.num_experts)
    if limits.top_k is not None and top_k != limits.top_k:
        raise ShapeError(
            f"ids must be [N, K] with K={limits.top_k} (top_k of this layer), got {list(ids.shape)}"
        )
    if limits.max_num_tokens is not None and num_tokens > limits.max_num_tokens:
        raise ShapeError(
            f"x must have at most max_num_tokens={limits.max_num_tokens} tokens, got {num_tokens}"
        )


def checked_activation(given: str | Activation, gate_up: tuple[int, ...], inter: int) -> Activation:
    """The activation that was given, for gate_up [L, 2I, H] or [L, I, H]. BackendError for none, ShapeError for one that
    wants other rows.
    """
    activation = resolve_activation(given)
    if not callable(activation) or not hasattr(activation, "gated"):
        raise BackendError(f"activation must be a name or an Activation, got {given!r}")
    if activation.gated != (gate_up[1] == 2 * inter):
        rows = "[L, 2I, H], gate and up" if activation.gated else "[L, I, H], without a gate"
        raise ShapeError(f"activation {given!r} must have gate_up of shape {rows}, got {list(gate_up)}")
    return activation


def check_input_format(given: str | None, **sizes: int) -> None:
    """FormatError for a format of activations that there is not, ShapeError for sizes, by name, that it cannot block."""
    if given is None:
        return
    if not isinstance(given, str) or given not in INPUT_FORMATS:
        raise FormatError(unknown_name("input_format", given, INPUT_FORMATS))
    block = INPUT_FORMATS[given]
    for name, size in sizes.items():
        if size % block:
            raise ShapeError(f"input_format={given!r} must have {name} divisible by {block}, got {size}")


def check_top_k(top_k: int, num_experts: int | None) -> None:
    """Raise RoutingError for more experts a token than there are."""
    if num_experts is not None and top_k > num_experts:
        raise RoutingError(
            f"top_k must be at most the number of experts {num_experts}, got {top_k}; where w holds one "
            "rank's share of the experts, pass num_experts="
        )

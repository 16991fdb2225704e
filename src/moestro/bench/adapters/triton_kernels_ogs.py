"""triton_kernels as vLLM 0.33 bundles it (3.5.1: `matmul_ogs`), on MXFP4 and bf16 weights.

A layer is: the package's routing from a bit matrix of the given ids (ogs_glue.py), the product with the activation in
its epilogue, the product that scatters, weights and sums. Its epilogue takes gates and ups in turn, so rows are
interleaved once. MXFP4 weights are swizzled for Hopper and run without split-K, as vLLM does. Its routing takes a
power of two of experts a token. It runs under Triton 3.6; newer ones of the package (3.7: `matmul`) do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import first_reason, installed, local_pairs, swiglu_only
from moestro.bench.contenders import Call
from moestro.bench.layers import Case, activation_of
from moestro.bench.models import MoeShape
from moestro.formats import BF16, MXFP4
from moestro.kernels.activations import SwiGLU

if TYPE_CHECKING:
    from moestro.formats.base import FormatTensor
    from moestro.moe.weights import ExpertWeights

__all__ = ["OgsLayer", "missing"]

WARPS = 8  # that the scales are swizzled for, vLLM's choice
GROUPS = 4  # vLLM pads the groups of a row to a multiple of this
HOPPER = {"split_k": 1}  # vLLM's constraint on the settings of MXFP4 products


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """[L, 2I, ...] gates first -> gate, up, gate, up, …"""
    return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)


def _swizzled(packed: torch.Tensor, scale: torch.Tensor) -> tuple[Any, Any]:
    """(weights, precision) of MXFP4 pieces [L, R, C/2] and [L, R, C/32] in the package's layout for this GPU."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    scale = torch.nn.functional.pad(scale, (0, -scale.shape[-1] % GROUPS))
    values, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scales, more = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=WARPS)
    weights = convert_layout(wrap_torch_tensor(packed.transpose(-2, -1), dtype=FP4), values, **options)
    swizzled = convert_layout(wrap_torch_tensor(scale.transpose(-2, -1)), scales, **more)
    return weights, PrecisionConfig(weight_scale=swizzled, flex_ctx=FlexCtx())


def _laid_out(weight: FormatTensor, gated: bool) -> tuple[Any, Any]:
    """(weights [L, C, R], precision), with gates and ups in turn where it has them."""
    from triton_kernels.matmul_ogs import PrecisionConfig

    turn = interleaved if gated else torch.Tensor.contiguous
    if isinstance(weight, MXFP4):
        return _swizzled(turn(weight.packed), turn(weight.scale))
    assert isinstance(weight, BF16)
    return turn(weight.data).transpose(-2, -1), PrecisionConfig()


def _activation(act: SwiGLU) -> Any:
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation

    if act == SwiGLU():
        from moestro.bench.adapters.ogs_glue import silu

        return FusedActivation(FnSpecs("silu", silu, ()), (), 2)
    from triton_kernels.swiglu import swiglu_fn

    assert act.up_shift == 1.0, "the package's SwiGLU adds one to the ups"
    return FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (act.alpha, act.limit), 2)


class OgsLayer:
    """Both products with their routing."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape) -> None:
        act = activation_of(shape)
        assert isinstance(act, SwiGLU)
        self._shape, self._activation = shape, _activation(act)
        self._first, self._precision1 = _laid_out(weights.gate_up, gated=True)
        self._second, self._precision2 = _laid_out(weights.down, gated=False)
        first, second = weights.gate_up_bias, weights.down_bias
        self._bias1 = None if first is None else interleaved(first).float()
        self._bias2 = None if second is None else second.float()
        self._constraints = HOPPER if isinstance(weights.gate_up, MXFP4) else {}
        self.nbytes = weights.nbytes

    def bind(self, case: Case) -> Call:
        from triton_kernels.matmul_ogs import matmul_ogs
        from triton_kernels.matmul_ogs_details import opt_flags
        from triton_kernels.routing import routing_from_bitmatrix
        from triton_kernels.tensor import Bitmatrix

        from moestro.bench.adapters import ogs_glue

        shape, x, ids = self._shape, case.x, case.ids
        experts, columns = shape.num_local_experts, -(-shape.num_local_experts // 32)
        words = torch.empty(len(x), columns, dtype=torch.int32, device=x.device)

        def call() -> torch.Tensor:
            opt_flags.reset_opt_flags_constraints()  # they are the package's, not the layer's
            opt_flags.update_opt_flags_constraints(self._constraints)
            ogs_glue.bits(ids, words)
            matrix = Bitmatrix(
                words.view(torch.uint32), shape=[len(x), columns * 32], shape_max=[len(x), None]
            )
            routing, gather, scatter = routing_from_bitmatrix(matrix, case.weights, ids, experts, shape.top_k)
            hidden = matmul_ogs(
                x, self._first, self._bias1, routing, gather_indx=gather,
                precision_config=self._precision1, fused_activation=self._activation,
            )  # fmt: skip
            y: torch.Tensor = matmul_ogs(
                hidden, self._second, self._bias2, routing, scatter_indx=scatter,
                precision_config=self._precision2, gammas=routing.gate_scal,
            )  # fmt: skip
            return y

        return call


def missing(shape: MoeShape) -> str | None:
    """Why it cannot run a shape here; None if it can."""
    return first_reason(
        lambda: installed("triton_kernels", "vLLM bundles 3.5.1 in vllm/third_party; it is on no registry"),
        lambda: swiglu_only(shape),
        lambda: local_pairs(shape),
        lambda: _power_of_two(shape.top_k),
        _not_importable,
    )


def _power_of_two(top_k: int) -> str | None:
    return (
        None
        if top_k & (top_k - 1) == 0
        else f"its routing takes a power of two of experts a token, not {top_k}"
    )


def _not_importable() -> str | None:
    try:
        from triton_kernels.matmul_ogs import matmul_ogs  # noqa: F401
        from triton_kernels.routing import routing_from_bitmatrix  # noqa: F401
    except Exception as error:  # other people's code may raise anything, say under another Triton
        return f"this triton_kernels is another package, or not Triton 3.5's: {error}"
    return None

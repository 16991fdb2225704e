"""vLLM's fused MoE kernels, called as its layers call them: Marlin on NVFP4 (W4A16) and Triton on bf16.

Not run by us: vLLM's wheel is too large for the machine that we measured on. Checked against the Python
sources of vLLM 0.11 (Triton only), 0.14, 0.17, 0.20, 0.24, 0.28 and 0.32, which differ in a few arguments and
places. SiLU is every version's default activation; some name it by text, some by an enum.

Marlin keeps scales in an encoding of its own. From 0.20 on, all subnormal e4m3 scales (below 2^-6) of a layer
whose largest scale is 448 become zero, and its output differs on weights that have some; 0.14 and 0.17 round
the global scale to bfloat16, which alone is half of the error that the bench allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import Adapter, installed, plain_silu
from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.formats import BF16, NVFP4

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["MARLIN", "TRITON", "accepted"]

BLOCKS_PER_SM = 4  # that vLLM's MoE layers make Marlin's workspace for


def accepted(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Those of the given arguments that a function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known}


def _routing(shape: MoeShape, device: torch.device) -> dict[str, Any]:
    """Arguments that say which experts are here: none where all are."""
    if shape.ep == 1 or shape.local_pairs:
        return {"global_num_experts": shape.num_local_experts, "expert_map": None}
    local = shape.num_local_experts
    mapped = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
    mapped[:local] = torch.arange(local, dtype=torch.int32, device=device)
    return {"global_num_experts": shape.num_experts, "expert_map": mapped}


class _Triton:
    """fused_experts on dense weights, with the settings that vLLM ships or guesses for the device."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape) -> None:
        assert isinstance(weights.gate_up, BF16)
        assert isinstance(weights.down, BF16)
        self._shape, self._w1, self._w2 = shape, weights.gate_up.data, weights.down.data
        self.nbytes = weights.nbytes

    def bind(self, case: Case) -> Call:
        from vllm.model_executor.layers.fused_moe import fused_experts

        routing = _routing(self._shape, case.x.device)

        def call() -> torch.Tensor:
            y: torch.Tensor = fused_experts(case.x, self._w1, self._w2, case.weights, case.ids, **routing)
            return y

        return call


def _prepare_for_marlin() -> Callable[..., Any]:
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
        prepare_nvfp4_moe_layer_for_marlin,
    )

    prepare: Callable[..., Any] = prepare_nvfp4_moe_layer_for_marlin
    return prepare


class _Marlin:
    """fused_marlin_moe on NVFP4 weights that vLLM has repacked."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape) -> None:
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new

        first, second = weights.gate_up, weights.down
        assert isinstance(first, NVFP4)
        assert isinstance(second, NVFP4)
        self._shape = shape
        layer = SimpleNamespace(
            num_experts=shape.num_local_experts,
            hidden_size=shape.hidden_size,
            intermediate_size_per_partition=shape.intermediate_size,
            params_dtype=torch.bfloat16,
        )
        prepare = _prepare_for_marlin()
        gated = accepted(prepare, is_act_and_mul=True)  # 0.14 knows no other
        w1, s1, g1, w2, s2, g2 = prepare(layer, *first.pieces, *second.pieces, **gated)
        self._tensors = {
            "w1": w1,
            "w2": w2,
            "w1_scale": s1,
            "w2_scale": s2,
            "global_scale1": g1,
            "global_scale2": g2,
        }
        # Up to 0.28 `prepare` leaves one on the layer; without one every product allocates its own.
        self._workspace = marlin_make_workspace_new(first.packed.device, BLOCKS_PER_SM)
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def bind(self, case: Case) -> Call:
        from vllm.scalar_type import scalar_types

        try:
            from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        except ImportError:  # its place up to 0.20
            from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe

        more = accepted(fused_marlin_moe, gating_output=None)  # 0.14 insists on it and does not read it
        more |= _routing(self._shape, case.x.device)

        def call() -> torch.Tensor:
            y: torch.Tensor = fused_marlin_moe(
                hidden_states=case.x,
                bias1=None,
                bias2=None,
                topk_weights=case.weights,
                topk_ids=case.ids,
                quant_type_id=scalar_types.float4_e2m1f.id,
                workspace=self._workspace,
                **self._tensors,
                **more,
            )
            return y

        return call


def _missing(shape: MoeShape) -> str | None:
    return installed("vllm", "pip install vllm") or plain_silu(shape)


def _marlin_missing(shape: MoeShape) -> str | None:
    reason = _missing(shape)
    if reason is None:
        try:
            _prepare_for_marlin()
        except Exception as error:  # other people's code may raise anything
            return f"this vllm cannot repack NVFP4 experts for Marlin as 0.14 and newer do: {error}"
    return reason


MARLIN = Adapter("marlin", "nvfp4", _marlin_missing, _Marlin)
TRITON = Adapter("vllm_triton", "bf16", _missing, _Triton)

"""Small stand-ins for the vLLM classes that the plugin touches: same names, constructor arguments, parameters.

They have what vLLM 0.32's have where the plugin looks (test_stand_ins.py compares them with vLLM's own), and a
computation that says "vLLM" instead of doing it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from moestro.formats import MXFP4, NVFP4


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        return not self.value.endswith("_no_mul")


@dataclass
class Parallel:
    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    pcp_size: int = 1
    use_ep: bool = False
    enable_eplb: bool = False
    all2all_backend: str = "allgather_reducescatter"
    use_all2all_kernels: bool = False
    use_passthrough_all2all: bool = False


@dataclass
class Config:
    """FusedMoEConfig."""

    num_experts: int = 4
    num_local_experts: int = 4
    experts_per_token: int = 2
    hidden_dim: int = 64
    intermediate_size_per_partition: int = 32
    activation: MoEActivation = MoEActivation.SILU
    in_dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    moe_backend: str = "auto"
    max_num_tokens: int = 64
    elastic_ep_max_dp_size: int = 1
    has_bias: bool = False
    is_lora_enabled: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    max_capture_size: int = 0
    moe_parallel_config: Parallel = field(default_factory=Parallel)

    @property
    def is_act_and_mul(self) -> bool:
        return self.activation.is_gated


class FusedMoEMethodBase:
    def __init__(self, moe: Config) -> None:
        self.moe = moe

    def apply(self, layer: Any, x: torch.Tensor, *args: Any) -> str:
        return "vLLM"


def method_classes() -> SimpleNamespace:
    """vLLM's method classes, new ones, so that a test may install hooks in them."""

    class ModelOptNvFp4FusedMoE(FusedMoEMethodBase):
        def __init__(self, quant_config: Any, moe_config: Config) -> None:
            super().__init__(moe_config)
            self.backend = "marlin"

        def create_weights(
            self,
            layer: Any,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: Any,
            **extra: Any,
        ) -> None:
            experts, hidden, inter = num_experts, hidden_size, intermediate_size_per_partition
            shards = 2 if self.moe.is_act_and_mul else 1
            assert self.use_global_sf is False  # type: ignore[attr-defined]
            _add(layer, "w13_weight", (experts, shards * inter, hidden // 2), torch.uint8)
            _add(layer, "w2_weight", (experts, hidden, inter // 2), torch.uint8)
            _add(layer, "w13_weight_scale", (experts, shards * inter, hidden // 16), torch.float8_e4m3fn)
            _add(layer, "w2_weight_scale", (experts, hidden, inter // 16), torch.float8_e4m3fn)
            for name, shape in {"w13": (experts, shards), "w2": (experts,)}.items():
                _add(layer, f"{name}_weight_scale_2", shape, torch.float32)
                _add(layer, f"{name}_input_scale", shape, torch.float32)

    class GptOssMxfp4MoEMethod(FusedMoEMethodBase):
        def create_weights(
            self,
            layer: Any,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: Any,
            **extra: Any,
        ) -> None:
            experts, hidden, inter = num_experts, hidden_size, intermediate_size_per_partition
            _add(layer, "w13_weight", (experts, 2 * inter, hidden // 2), torch.uint8)
            _add(layer, "w2_weight", (experts, hidden, inter // 2), torch.uint8)
            _add(layer, "w13_weight_scale", (experts, 2 * inter, hidden // 32), torch.uint8)
            _add(layer, "w2_weight_scale", (experts, hidden, inter // 32), torch.uint8)
            if self.moe.has_bias:
                _add(layer, "w13_bias", (experts, 2 * inter), torch.bfloat16)
                _add(layer, "w2_bias", (experts, hidden), torch.bfloat16)

    class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
        def create_weights(
            self,
            layer: Any,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: Any,
            **extra: Any,
        ) -> None:
            experts, hidden, inter = num_experts, hidden_size, intermediate_size_per_partition
            shards = 2 if self.moe.is_act_and_mul else 1
            _add(layer, "w13_weight", (experts, shards * inter, hidden), params_dtype)
            _add(layer, "w2_weight", (experts, hidden, inter), params_dtype)

    class Fp8MoEMethod(FusedMoEMethodBase):
        def __init__(self, quant_config: Any, layer: Any) -> None:
            super().__init__(layer.moe_config)

        def create_weights(
            self,
            layer: Any,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: Any,
            **extra: Any,
        ) -> None:
            experts, hidden, inter = num_experts, hidden_size, intermediate_size_per_partition
            assert self.weight_scale_name == "weight_scale_inv"  # type: ignore[attr-defined]
            assert self.weight_block_size == self.moe_block_shape == [128, 128]  # type: ignore[attr-defined]
            for name, rows, columns in (("w13", 2 * inter, hidden), ("w2", hidden, inter)):
                _add(layer, f"{name}_weight", (experts, rows, columns), torch.float8_e4m3fn)
                blocks = (experts, rows // 128, columns // 128)
                _add(layer, f"{name}_weight_scale_inv", blocks, torch.float32)

    return SimpleNamespace(
        fp8_block=Fp8MoEMethod,
        nvfp4=ModelOptNvFp4FusedMoE,
        mxfp4=GptOssMxfp4MoEMethod,
        bf16=UnquantizedFusedMoEMethod,
    )


def _add(layer: torch.nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))


class RoutedExperts(torch.nn.Module):
    """A layer; method is what vLLM's quantisation configuration gives."""

    def __init__(
        self, method: Any, expert_map: torch.Tensor | None = None, weight_on_input: bool = False
    ) -> None:
        super().__init__()
        moe: Config = method.moe
        self.layer_name = "model.layers.0.mlp.experts"
        self.quant_method, self.expert_map = method, expert_map
        self.apply_router_weight_on_input = weight_on_input
        self.activation = moe.activation
        hidden, inter = moe.hidden_dim, moe.intermediate_size_per_partition
        kept = method.maybe_roundup_sizes(hidden, inter, moe.in_dtype, moe.moe_parallel_config)
        assert kept == (hidden, inter)
        method.create_weights(
            layer=self,
            num_experts=moe.num_local_experts,
            hidden_size=hidden,
            unpadded_hidden_size=moe.hidden_dim,
            intermediate_size_per_partition=inter,
            params_dtype=moe.in_dtype,
            weight_loader=None,
            global_num_experts=moe.num_experts,
        )


def quant_config(algo: str = "W4A16_NVFP4") -> SimpleNamespace:
    return SimpleNamespace(
        quant_method=algo, is_checkpoint_nvfp4_serialized=True, group_size=16, moe_activation_override=None
    )


def load(layer: RoutedExperts, **values: torch.Tensor) -> None:
    """What vLLM's weight loaders do."""
    for name, value in values.items():
        data = getattr(layer, name).data
        raw = value.dtype.itemsize == 1 and value.dtype != data.dtype
        data.copy_(value.view(data.dtype) if raw else value)


@dataclass(frozen=True)
class Dense:
    """Random experts: gate and up [E, I, H], down [E, H, I], of very different magnitudes."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def random(
        cls, moe: Config, seed: int = 0, experts: int | None = None, inter: int | None = None
    ) -> Dense:
        make = torch.Generator().manual_seed(seed)
        e, h = moe.num_experts if experts is None else experts, moe.hidden_dim
        i = inter or moe.intermediate_size_per_partition
        gate, up, down = (torch.randn(e, *rows, generator=make) / 8 for rows in ((i, h), (i, h), (h, i)))
        return cls(gate, up * 3, down)

    def nvfp4(self) -> dict[str, torch.Tensor]:
        """ModelOpt's tensors as vLLM holds them."""
        gate, up, down = (NVFP4.quantize(t) for t in (self.gate, self.up, self.down))
        return {
            "w13_weight": torch.cat([gate.packed, up.packed], 1),
            "w13_weight_scale": torch.cat([gate.scale, up.scale], 1),
            "w13_weight_scale_2": torch.stack([gate.global_scale, up.global_scale], 1),
            "w2_weight": down.packed,
            "w2_weight_scale": down.scale,
            "w2_weight_scale_2": down.global_scale,
        }

    def nvfp4_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up, down) in float32 that nvfp4() stands for."""
        gate, up, down = (
            NVFP4.quantize(t).dequantize(torch.float32) for t in (self.gate, self.up, self.down)
        )
        return torch.cat([gate, up], 1), down

    def mxfp4(self) -> dict[str, torch.Tensor]:
        """gpt-oss' tensors: rows of gate and up alternate."""
        alternating = torch.stack([self.gate, self.up], 2).flatten(1, 2)
        gate_up, down = MXFP4.quantize(alternating), MXFP4.quantize(self.down)
        return {
            "w13_weight": gate_up.packed,
            "w13_weight_scale": gate_up.scale,
            "w2_weight": down.packed,
            "w2_weight_scale": down.scale,
        }

    def mxfp4_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, down = (
            MXFP4.quantize(t).dequantize(torch.float32) for t in (self.gate, self.up, self.down)
        )
        return torch.cat([gate, up], 1), down

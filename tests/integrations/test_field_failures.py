"""What the field got wrong with MoE checkpoints (public reports), each as a small checkpoint that must come out right.

Written by the producers' own library where it installs (compressed-tensors), by its layout elsewhere; the truth is the
model dequantised by the producer's formula, run by Transformers' eager experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moestro
from moestro.checkpoints import Experts
from moestro.formats import NVFP4

transformers = pytest.importorskip("transformers", minversion="5.7")

import tiny  # noqa: E402

F32, P = torch.float32, "model.layers.0.mlp.experts"
pytestmark = pytest.mark.usefixtures("registered")


def right(folder: Path, model: Any, truth: Any) -> None:
    ours = type(model).from_pretrained(folder, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5


@pytest.mark.parametrize("limit", [7.0, 20.0, 1.5])
def test_a_clamp_lost_vllm_49070(tmp_path: Path, limit: float) -> None:
    """NVFP4 gate and up far beyond the clamp."""

    def make() -> Any:
        config = tiny.gpt_oss().config
        config.swiglu_limit = limit
        model = transformers.GptOssForCausalLM(config)
        for module in model.modules():
            if hasattr(module, "limit"):
                module.limit = limit
        return model

    model = tiny.random_model(make, F32, scale=2.0)
    truth = tiny.write_gpt_oss(tmp_path, model)
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    for both in (ours, truth):
        for module in both.modules():
            if hasattr(module, "limit"):
                module.limit = limit
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-4


def test_routed_scaling_lost_sglang_29931(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **{**tiny.SMALL, "num_key_value_heads": 2, "head_dim": 16},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        intermediate_size=64,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    model = tiny.random_model(lambda: transformers.DeepseekV3ForCausalLM(config), F32)
    right(tmp_path, model, tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4", linears=True))


def test_gate_and_up_with_scales_that_differ(tmp_path: Path) -> None:
    """vLLM uses gate's global scale for up, too."""
    model = tiny.random_model(tiny.qwen3, F32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                p[:, :32] *= 50
    truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    tensors = load_file(tmp_path / "model.safetensors")
    scales = [tensors[f"{P}.0.{name}.weight_scale_2"] for name in ("gate_proj", "up_proj")]
    assert float(scales[0] / scales[1]) > 20
    right(tmp_path, model, truth)


def test_a_global_scale_dropped_transformers_48371(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    right(tmp_path, model, tiny.write_per_expert(tmp_path, model, "compressed-tensors-nvfp4"))


def test_no_gate_vllm_31782(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.nemotron, F32)
    right(tmp_path, model, tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4"))


@pytest.mark.parametrize("inter", [2880, 1856, 1408])
@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_sizes_that_are_no_power_of_two(inter: int, backend: str) -> None:
    g, tensors, dense = torch.Generator().manual_seed(0), {}, {}
    for e in range(2):
        for name, shape in {
            "gate_proj": (inter, 64),
            "up_proj": (inter, 64),
            "down_proj": (64, inter),
        }.items():
            q = NVFP4.quantize(torch.randn(shape, generator=g) / 8)
            pieces = {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.global_scale}
            tensors |= {f"{P}.{e}.{name}.{suffix}": piece for suffix, piece in pieces.items()}
            dense[e, name] = q.dequantize()
    w = moestro.ExpertWeights.from_experts(Experts(tensors, P), backend)
    x, ids = torch.randn(3, 64, generator=g), torch.tensor([[0], [1], [0]], dtype=torch.int32)
    y = moestro.fused_moe(x, ids, torch.ones(3, 1), w)
    for n, e in enumerate(ids[:, 0].tolist()):
        gate, up = dense[e, "gate_proj"] @ x[n], dense[e, "up_proj"] @ x[n]
        want = dense[e, "down_proj"] @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(y[n], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_subnormal_scales_survive(backend: str) -> None:
    """Marlin flushes the smallest e4m3 to zero: 2^-9, 2^-8, 3 · 2^-9, ..."""
    codes = torch.arange(8, dtype=torch.uint8).repeat(8)  # 0 and the seven subnormals
    scale = codes[:, None].expand(64, 4).contiguous().view(torch.float8_e4m3fn)
    packed = torch.full((64, 32), 0x22, dtype=torch.uint8)  # e2m1 1.0
    tensors = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        pieces = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(1.0)}
        tensors |= {f"{P}.0.{name}.{suffix}": piece for suffix, piece in pieces.items()}
    gate_up, down = moestro.ExpertWeights.from_experts(Experts(tensors, P), backend).dequantize()
    want = (codes.double() / 512).float()[:, None].expand(64, 64)
    assert torch.equal(down[0], want)
    assert torch.equal(gate_up[0], want.repeat(2, 1))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_compressed_tensors_own_weights(kind: str) -> None:
    """Packed by the library itself; the values are those that it unpacks."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cls = getattr(compressors, f"{kind.upper()}PackedCompressor", None)
    if cls is None:
        pytest.skip(f"compressed-tensors has no {kind.upper()}PackedCompressor")
    shape = {"nvfp4": ("tensor_group", 16), "mxfp4": ("group", 32)}[kind]
    args = QuantizationArgs(num_bits=4, type="float", strategy=shape[0], group_size=shape[1], symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=f"{kind}-pack-quantized")
    g, tensors, truth = torch.Generator().manual_seed(0), {}, {}
    for name, size in {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}.items():
        w = torch.randn(size, generator=g)
        blocks = w.view(size[0], -1, shape[1]).abs().amax(-1)
        given: dict[str, torch.Tensor] = {"weight": w}
        if kind == "nvfp4":
            given["weight_global_scale"] = (448 * 6 / w.abs().max()).reshape(1)
            given["weight_scale"] = (
                (blocks / 6 * given["weight_global_scale"]).to(torch.float8_e4m3fn).float()
            )
        else:
            given["weight_scale"] = torch.exp2((blocks / 6).log2().ceil())
        packed = cls.compress(dict(given), scheme)
        tensors |= {f"{P}.0.{name}.{suffix}": piece for suffix, piece in packed.items()}
        truth[name] = cls.decompress(dict(packed), scheme)["weight"].float()
    gate_up, down = moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable").dequantize()
    rtol = 1e-2 if truth["up_proj"].abs().max() != gate_up[0, 32:].abs().max() else 3e-7  # its bf16 unpacking
    torch.testing.assert_close(
        gate_up[0], torch.cat([truth["gate_proj"], truth["up_proj"]]), rtol=rtol, atol=0
    )
    torch.testing.assert_close(down[0], truth["down_proj"], rtol=rtol, atol=0)

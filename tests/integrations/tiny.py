"""Tiny models and their checkpoints in the layouts that producers write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from moestro.checkpoints.int4 import to_compressed_tensors
from moestro.formats import INT4, MXFP4, MXFP8, NVFP4, FP8Block

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def qwen3(hidden: int = 64, inter: int = 32) -> Any:
    config = transformers.Qwen3MoeConfig(
        **{**SMALL, "hidden_size": hidden},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=inter,
        intermediate_size=48,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32
    )
    return transformers.MixtralForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32
    )
    return transformers.GptOssForCausalLM(config)


def nemotron() -> Any:
    config = transformers.NemotronHConfig(
        **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
        layers_block_type=["moe", "attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        intermediate_size=32,
        mamba_num_heads=2,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=16,
        moe_latent_size=None,
    )
    return transformers.NemotronHForCausalLM(config)


def random_model(make: Any, dtype: torch.dtype = torch.bfloat16, scale: float = 0.2) -> Any:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(0, scale)
    return model.to(dtype).eval()


def logits(model: Any, implementation: str | None = None, num_tokens: int = 9) -> torch.Tensor:
    if implementation:
        model.set_experts_implementation(implementation)
    tokens = torch.arange(num_tokens)[None] * 7 % 64
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result.float()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- checkpoints -----------------------------------------------------------------------------------------
def nvfp4_modelopt(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = NVFP4.quantize(w.float())
    pieces = {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.global_scale}
    return {**pieces, "input_scale": torch.tensor(0.01)}, q.dequantize()


def nvfp4_w4a16(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = NVFP4.quantize(w.float())
    return {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.global_scale}, q.dequantize()


def nvfp4_compressed(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = NVFP4.quantize(w.float())
    packed = {
        "weight_packed": q.packed,
        "weight_scale": q.scale,
        "weight_global_scale": 1 / q.global_scale[None],
    }
    return packed, NVFP4.from_compressed_tensors(*packed.values()).dequantize()


def mxfp4_compressed(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = MXFP4.quantize(w.float())
    return {"weight_packed": q.packed, "weight_scale": q.scale}, q.dequantize()


def mxfp8_modelopt(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = MXFP8.quantize(w.float())
    return {"weight": q.data, "weight_scale": q.scale}, q.dequantize()


def fp8_deepseek(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = FP8Block.quantize(w.float())
    return {"weight": q.data, "weight_scale_inv": q.scale_inv}, q.dequantize()


def fp8_ue8m0(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """128 x 128 blocks with scales that are powers of two."""
    q = FP8Block.quantize(w.float())
    power = torch.exp2(q.scale_inv.log2().ceil())
    data = (
        w.float() / power.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    ).to(torch.float8_e4m3fn)
    scale = power.to(torch.float8_e8m0fnu)
    return {"weight": data, "weight_scale_inv": scale}, FP8Block(data, power).dequantize()


def fp8_32x32(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = w.shape
    blocks = w.float().view(rows // 32, 32, columns // 32, 32)
    power = torch.exp2((blocks.abs().amax((1, 3)) / 448).log2().ceil())
    data = (blocks / power[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    dense = (data.float().view(blocks.shape) * power[:, None, :, None]).view(rows, columns)
    return {"weight": data, "weight_scale_inv": power.to(torch.float8_e8m0fnu)}, dense


def int4_compressed(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q = INT4.quantize(w.float())
    return to_compressed_tensors(q), q.dequantize()


def words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[A, 8 B] codes to int32 [A, B], nibble i from column order[i]."""
    out = sum(codes[:, column::8].long() << 4 * i for i, column in enumerate(order))
    assert isinstance(out, torch.Tensor)
    return (out - ((out >> 31) << 32)).to(torch.int32)


def of_codes(w: torch.Tensor) -> tuple[torch.Tensor, INT4]:
    q = INT4.quantize(w.float(), symmetric=False, dtype=torch.float16)
    return torch.stack([q.packed & 15, q.packed >> 4], -1).flatten(-2), q


def int4_awq(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    (codes, q), order = of_codes(w), (0, 2, 4, 6, 1, 3, 5, 7)
    pieces = {"qweight": words(codes.T, order), "qzeros": words(q.zero.T, order)}
    return {**pieces, "scales": q.scale.T.contiguous()}, q.dequantize()


def int4_gptq(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, q = of_codes(w)
    q = INT4(q.packed, q.scale, q.zero.clamp(min=1))  # zero - 1 is what is stored
    pieces = {"qweight": words(codes).T.contiguous(), "qzeros": words((q.zero - 1).T)}
    index = torch.arange(w.shape[1], dtype=torch.int32) // 32
    return {**pieces, "scales": q.scale.T.contiguous(), "g_idx": index}, q.dequantize()


MODELOPT = {"quant_method": "modelopt", "exclude_modules": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}
# what the field calls it -> (how a projection is written, its quantization_config)
PER_EXPERT: dict[str, tuple[Any, dict[str, Any]]] = {
    "modelopt-nvfp4": (nvfp4_modelopt, {**MODELOPT, "quant_algo": "NVFP4"}),
    "modelopt-w4a16-nvfp4": (nvfp4_w4a16, {**MODELOPT, "quant_algo": "W4A16_NVFP4"}),
    "modelopt-mxfp8": (mxfp8_modelopt, {**MODELOPT, "quant_algo": "MXFP8"}),
    "compressed-tensors-nvfp4": (
        nvfp4_compressed,
        {**COMPRESSED, "format": "nvfp4-pack-quantized", "config_groups": {}},
    ),
    "compressed-tensors-mxfp4": (
        mxfp4_compressed,
        {**COMPRESSED, "format": "mxfp4-pack-quantized", "config_groups": {}},
    ),
    "compressed-tensors-int4": (
        int4_compressed,
        {**COMPRESSED, "format": "pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
    ),
    "awq": (int4_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "gptq": (int4_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "deepseek-fp8": (fp8_deepseek, {**FP8, "weight_block_size": [128, 128]}),
    "deepseek-fp8-ue8m0": (fp8_ue8m0, {**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}),
    "deepseek-v4-fp8-32x32": (fp8_32x32, {**FP8, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}),
}


def write_per_expert(
    folder: Path, model: Any, layout: str, *, linears: bool = False, experts: str = ".experts."
) -> Any:
    """A checkpoint of `model` in a layout, and the model whose weights are what the checkpoint stands for.

    linears: quantise the attention's projections, too.
    """
    quantise, raw = PER_EXPERT[layout]
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    written, values = {}, {}
    for name, tensor in tensors.items():
        wanted = experts in name or (linears and "self_attn" in name and "norm" not in name)
        if wanted and name.endswith(".weight"):
            pieces, dense = quantise(tensor)
            written |= {
                f"{name.removesuffix('weight')}{suffix}": v.contiguous() for suffix, v in pieces.items()
            }
            values[name] = dense.to(tensor.dtype)
        else:
            written[name] = values[name] = tensor
    return finish(folder, model, written, values, raw)


def finish(folder: Path, model: Any, written: Any, values: Any, raw: dict[str, Any]) -> Any:
    """Write the tensors and the config; give the dequantised model."""
    truth_folder = folder / "truth"
    truth_folder.mkdir()
    save_file(values, truth_folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(truth_folder)
    truth = type(model).from_pretrained(truth_folder, experts_implementation="eager")
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": raw}))
    return truth


def write_gpt_oss(folder: Path, model: Any) -> Any:
    """gpt-oss' MXFP4: blocks and scales of interleaved rows, biases."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    written, values = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            q = MXFP4.quantize(tensor.mT.contiguous().float())  # [E, 2I, H], rows alternating
            written[f"{name}_blocks"] = q.packed.view(*q.scale.shape, 16)
            written[f"{name}_scales"] = q.scale
            values[name] = q.dequantize().mT.contiguous().to(tensor.dtype)
        else:
            written[name] = values[name] = tensor
    return finish(folder, model, written, values, {"quant_method": "mxfp4"})

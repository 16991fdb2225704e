"""Tiny random MoE models on disk, in the layouts that real checkpoints have.

Made with Transformers' own classes and save_pretrained; `nvfp4` and `mxfp4` then rewrite the experts as ModelOpt,
compressed-tensors and gpt-oss do, beside a bf16 model of the very values that the packed ones stand for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moestro.formats import MXFP4, NVFP4

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Moe", {**EXPERTS, "intermediate_size": 128, "norm_topk_prob": True}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "glm4": ("Glm4Moe", {**DEEPSEEK, "n_group": 1, "topk_group": 1, "use_qk_norm": False}),
    "deepseek": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "kv_lora_rank": 512,  # vLLM's MLA on CPUs takes 512 + 64 alone
            "q_lora_rank": 32,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "head_dim": 64,
            "topk_method": "noaux_tc",  # vLLM asks for it
        },
    ),
    "gptoss": (
        "GptOss",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 128},
    ),
}
EXPERT = re.compile(r"(.*\.experts\.\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3))\.weight$")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": []}


def bf16(folder: Path, name: str, **changes: Any) -> Path:
    """A model of random weights; the same each time."""
    import transformers

    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("_bias", "correction_bias")):  # Transformers makes them zero
            torch.nn.init.normal_(tensor.data, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """One that knows the words t0 ... t511, for the API server."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="t0", eos_token="t2")
    made.save_pretrained(folder)


def nvfp4(
    source: Path,
    packed: Path,
    dense: Path | None,
    layout: str = "modelopt",
    algo: str = "W4A16_NVFP4",
    kept_layer: str = "no layer",
) -> None:
    """The model of `source` with its experts in NVFP4, and one with what they stand for. kept_layer: this one's stay in
    bf16, as the checkpoint's list of exclusions says.

    Global scales are powers of two, so that the dense model holds the values exactly in bf16.
    """
    config = json.loads((source / "config.json").read_text())
    kept: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        found = EXPERT.match(name)
        if found is None or name.startswith(kept_layer):
            kept[name] = values[name] = tensor
            continue
        amax = tensor.float().abs().max()
        q = NVFP4.quantize(tensor, 2.0 ** torch.ceil(torch.log2(amax / 2688)))
        kept |= _pieces(found[1], q, layout, algo)
        values[name] = q.dequantize(torch.bfloat16)
    others = sorted({n.removesuffix(".weight") for n in kept if _is_linear(n) and ".experts." not in n})
    others += [f"{kept_layer}.mlp.experts*"] * any(n.startswith(kept_layer) for n in kept)
    config["quantization_config"] = _config(layout, algo, others)
    _write(packed, kept, config)
    if dense is not None:
        config.pop("quantization_config")
        _write(dense, values, config)


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and ("proj" in name or "gate" in name or "lm_head" in name)


def _pieces(prefix: str, q: NVFP4, layout: str, algo: str) -> dict[str, torch.Tensor]:
    inputs = torch.tensor(0.02)
    if layout == "modelopt":
        pieces = {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.global_scale}
        pieces |= {} if algo.startswith("W4A16") else {"input_scale": inputs}
    else:
        pieces = {
            "weight_packed": q.packed,
            "weight_scale": q.scale,
            "weight_global_scale": (1 / q.global_scale).reshape(1),
        }
        pieces |= {} if algo.startswith("W4A16") else {"input_global_scale": (1 / inputs).reshape(1)}
    return {f"{prefix}.{name}": piece for name, piece in pieces.items()}


def _config(layout: str, algo: str, others: list[str]) -> dict[str, Any]:
    if layout == "modelopt":
        return {**MODELOPT, "quant_algo": algo, "ignore": others}
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    inputs = None if algo.startswith("W4A16") else {**scheme, "dynamic": "local"}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": others,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "dynamic": False},
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def mxfp4(source: Path, packed: Path, dense: Path) -> None:
    """gpt-oss' own layout, from a bf16 gpt-oss model."""
    config = json.loads((source / "config.json").read_text())
    kept: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            kept[name] = values[name] = tensor
            continue
        q = MXFP4.quantize(tensor.mT.contiguous())  # on disk: [E, in, out] dense, [E, out, in] packed
        kept[f"{name}_blocks"] = q.packed.unflatten(-1, (-1, 16))
        kept[f"{name}_scales"] = q.scale
        values[name] = q.dequantize(torch.bfloat16).mT.contiguous()
    _write(dense, values, config)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    _write(packed, kept, config)


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))

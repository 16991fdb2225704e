"""Configurations of Transformers' MoE models, made small: what model_table.py makes its models of."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

E, K, H, I = 8, 2, 64, 32  # noqa: E741
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "moe_hidden_size", "n_embd", "moe_latent_size"), H),
    **dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "expert_hidden_size",
            "ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "intermediate_size_mlp",
            "moe_shared_expert_intermediate_size",
            "dense_intermediate_size",
        ),
        I,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), E
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k", "num_experts_per_token"), K
    ),
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


# What a module's own block gives it beside the config: one of several sizes in a list.
KEYWORDS = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": I}}


# What some configurations need beside SIZES to be a small model that runs; by folder.
OWN: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "glm4v_moe": {"head_dim": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe"],
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "qwen3_omni_moe": {"shared_expert_intermediate_size": I, "pad_token_id": 0},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "gemma4": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "enable_moe_block": True},
    "dots3_note": {"head_dim": 64, "vocab_size_per_layer_input": 64},
    "mistral4": {"head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "deepseek_ocr2": {"mlp_layer_types": ["sparse", "sparse"]},
    "hy_v4": {"indexer_types": ["full", "full"]},
    "hy_v4_vl": {"indexer_types": ["full", "full"]},
    "mimo_v2_flash": {"num_key_value_heads": 2, "mlp_layer_types": ["sparse", "sparse"]},
    "ernie4_5_vl_moe": {"head_dim": 128},
}


def configs(folder: str) -> Iterator[Any]:
    """The folder's configurations, made small."""
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    classes = [c for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
    for cls in sorted(classes, key=lambda c: ("Text" not in c.__name__, len(c.__name__))):
        try:
            config = cls()
        except Exception:
            continue
        yield shrunk(config)
        for part in ("text_config", "thinker_config"):
            if (inner := getattr(config, part, None)) is not None:
                yield shrunk(inner)


def shrunk(config: Any) -> Any:
    for name, value in SIZES.items():
        try:
            old = getattr(config, name, "absent")
            if old is None or (isinstance(old, int | list) and not isinstance(old, bool)):
                setattr(config, name, value)
        except Exception:  # a size that differs between layers, or has rules of its own
            continue
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        if isinstance(vars(config).get(name), list):
            setattr(config, name, vars(config)[name][-2:])
    return config

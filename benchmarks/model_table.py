"""Writes docs/models.md: every MoE class of the installed Transformers, tiny and random, on Moestro.

    python benchmarks/model_table.py [--only NAME] [--out docs/models.md]

For each experts class that goes through the experts interface: its module with random weights against Transformers'
eager one (float32 and bf16), and after quantize_experts against the dequantised weights. For each causal language
model that has one: greedy tokens in float32 equal to eager's. What is refused stands there with the refusal's text.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import logging
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import models

import moestro.integrations.transformers as mt
from moestro.formats import get
from moestro.integrations.transformers.modules import experts_modules, from_matrices, matrices

MOST = 20_000_000  # parameters of a model that is made
E, K, H, I, N = 8, 2, 64, 32, 9  # noqa: E741
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


def experts_classes() -> Iterator[tuple[str, type]]:
    """(model folder, class) of every experts module of Transformers' interface."""
    for info in pkgutil.iter_modules(models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{info.name}.modeling_{info.name}")
        except Exception:  # a folder without a model, or one whose dependency is not here
            continue
        if "use_experts_implementation" not in Path(str(module.__file__)).read_text():
            continue
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            if own and getattr(getattr(cls, "forward", None), "__wrapped__", None) and "Experts" in name:
                yield info.name, cls


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


def is_small(cls: type, config: Any) -> bool:
    """Whether the module is tiny; looked at without its memory, as some parts may keep their own sizes."""
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters()) < MOST


def module_of(folder: str, cls: type) -> Any:
    """An instance with random weights, of sizes that are ours where the config lets them be."""
    errors = []
    for config in configs(folder):
        try:
            if not is_small(cls, config):
                continue
            module = cls(config)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.fill_(1.0) if "norm" in name else p.normal_(0, 0.2)
        return module.eval()
    raise RuntimeError(f"cannot be made: {errors[:1]}")


def run(module: Any, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    hidden = up.shape[1] if module.is_transposed else up.shape[2]
    x = torch.randn(N, hidden, generator=g).to(dtype)
    ids = torch.stack([torch.randperm(module.num_experts, generator=g)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=g).to(dtype)
    module.config._experts_implementation = implementation
    with torch.no_grad():
        return module(x, ids, weights).float()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def quantised_error(module: Any) -> float:
    """After quantize_experts, against the values that it keeps."""
    dense, packed = copy.deepcopy(module), copy.deepcopy(module)
    values = (get("nvfp4").quantize(t.data).dequantize() for t in matrices(dense))
    for name, value in from_matrices(dense, *values).items():
        dense._parameters[name].data.copy_(value)
    mt.quantize_experts(packed, "nvfp4")
    up = next(iter(dense.parameters()))
    del up
    theirs = run(dense, "eager", torch.float32)
    g = torch.Generator().manual_seed(1)
    w = dense.gate_up_proj if dense.has_gate else dense.up_proj
    x = torch.randn(N, w.shape[1] if dense.is_transposed else w.shape[2], generator=g)
    ids = torch.stack([torch.randperm(dense.num_experts, generator=g)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=g)
    packed.config._experts_implementation = "moestro"
    with torch.no_grad():
        return error(packed(x, ids, weights).float(), theirs)


def greedy(folder: str) -> str:
    """Whether the folder's causal language model generates eager's tokens in float32."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    names = [n for n in vars(module) if n.endswith(("ForCausalLM", "TextModelForCausalLM"))]
    for name in names:
        for config in configs(folder):
            try:
                if not is_small(getattr(module, name), config):
                    continue
                torch.manual_seed(0)
                model = getattr(module, name)(config).eval()
                if not list(experts_modules(model)):
                    continue
                made = {}
                for implementation in ("eager", "moestro"):
                    model.set_experts_implementation(implementation)
                    tokens = torch.arange(1, 9)[None]
                    with torch.no_grad():
                        made[implementation] = model.generate(tokens, max_new_tokens=8, do_sample=False)
                return "equal" if torch.equal(made["eager"], made["moestro"]) else "**differ**"
            except mt.BackendError as refused:
                return f"refused: {refused}"
            except Exception:
                continue
    return "–"


def row(folder: str, cls: type) -> list[str]:
    try:
        module = module_of(folder, cls)
    except Exception as failed:
        return [folder, cls.__name__, str(failed)[:90], "", "", ""]
    try:
        truth = run(module, "eager", torch.float32)
        exact = f"{error(run(module, 'moestro', torch.float32), truth):.1e}"
        quantised = f"{quantised_error(module):.1e}"
        half = module.to(torch.bfloat16)
        rough = f"{error(run(half, 'moestro', torch.bfloat16), run(half, 'eager', torch.bfloat16)):.1e}"
    except Exception as refused:
        return [folder, cls.__name__, f"refused: {str(refused)[:140]}", "", "", greedy(folder)]
    return [folder, cls.__name__, exact, rough, quantised, greedy(folder)]


HEAD = """# Models

Every experts class that Transformers {version} runs through its experts interface, made tiny with random weights,
by `python benchmarks/model_table.py`. Errors are relative, of the module's result against Transformers' eager
experts: in float32, in bf16, and of NVFP4 experts (`quantize_experts`) against their dequantised values. Greedy: 8
tokens of the folder's causal language model in float32, against eager's; – where it has none that a tiny
configuration makes.

| model | class | float32 | bf16 | NVFP4 | greedy |
|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    mt.register()
    rows = []
    for folder, cls in experts_classes():
        if options.only in (None, folder):
            rows.append(row(folder, cls))
            print(" | ".join(rows[-1]), flush=True)
    fine = sum(r[2][:1].isdigit() for r in rows)
    equal = sum(r[5] == "equal" for r in rows)
    lines = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in r)} |" for r in rows)
    tail = f"\n\n{fine} of {len(rows)} classes run; {equal} models generate eager's tokens.\n"
    if options.only is None:
        options.out.write_text(HEAD.format(version=transformers.__version__) + lines + tail)


if __name__ == "__main__":
    main()

"""A model of Qwen3-30B-A3B's shapes from an NVFP4 checkpoint, in Transformers: tokens a second, memory, whose time.

    python benchmarks/cpu_model.py make DIR [--layers 4 --vocab 32768]
    python benchmarks/cpu_model.py compare DIR [--out FILE.json] [--rounds 10] [--lock FILE ...]

The checkpoint (ModelOpt W4A16_NVFP4: experts and attention; head, routers and embedding in bf16) has random weights.
Transformers' rows run the dequantised values of the same checkpoint in bf16. All models are in one process and take
turns, round by round, so that whatever else the machine does meets all of them; medians, and ratios of medians.
Prefill: 512 tokens into an empty cache, logits of the last one, as generate() does. Decode: one token after those.
The split is measured in passes of its own, with a clock around each experts module and each Linear layer. Memory is
that of the weights. --lock: files to lock exclusively, in this order, between loading and measuring.
MOESTRO_CPU_ISA=avx2 limits Moestro alone; ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 limit torch.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import moestro
import moestro.integrations.transformers as mt
from moestro.bench.results import environment, now
from moestro.integrations.transformers.bound import LAYER, bound_to
from moestro.integrations.transformers.linears import pack_linears, packed_linears
from moestro.integrations.transformers.modules import experts_modules

PROMPT, STEPS = 512, 6
BF16 = torch.bfloat16
LIMITS = ("MOESTRO_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def config_of(layers: int, vocab: int) -> Any:
    return transformers.Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def make(folder: Path, layers: int, vocab: int) -> None:
    """Write the checkpoint, a shard a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config, index = config_of(layers, vocab), {}
    raw = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "exclude_modules": ["lm_head", "*.gate"],
    }
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
                    "quantization_config": raw})
    )  # fmt: skip
    torch.manual_seed(0)
    for i in range(-1, layers):
        tensors = dict(_layer_tensors(config, i) if i >= 0 else _around(config))
        file = f"model-{i + 1:02d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _around(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    shape = config.vocab_size, config.hidden_size
    yield "model.embed_tokens.weight", torch.randn(shape).to(BF16)
    yield "lm_head.weight", (torch.randn(shape) * 0.02).to(BF16)
    yield "model.norm.weight", torch.ones(config.hidden_size, dtype=BF16)


def _layer_tensors(config: Any, i: int) -> Iterator[tuple[str, torch.Tensor]]:
    h, inter, heads = config.hidden_size, config.moe_intermediate_size, config.head_dim
    at = f"model.layers.{i}"
    for norm, size in (("input_layernorm", h), ("post_attention_layernorm", h), ("self_attn.q_norm", heads),
                       ("self_attn.k_norm", heads)):  # fmt: skip
        yield f"{at}.{norm}.weight", torch.ones(size, dtype=BF16)
    yield f"{at}.mlp.gate.weight", (torch.randn(config.num_experts, h) * 0.05).to(BF16)
    q, kv = config.num_attention_heads * heads, config.num_key_value_heads * heads
    for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
        yield from _quantised(f"{at}.self_attn.{name}_proj", rows, columns)
    for e in range(config.num_experts):
        for name, rows, columns in (("gate", inter, h), ("up", inter, h), ("down", h, inter)):
            yield from _quantised(f"{at}.mlp.experts.{e}.{name}_proj", rows, columns)


def _quantised(name: str, rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Random codes and scales, of about the size that initialised weights have: quantising would take minutes."""
    yield f"{name}.weight", torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    yield f"{name}.weight_scale", (torch.rand(rows, columns // 16) + 0.5).to(torch.float8_e4m3fn)
    yield f"{name}.weight_scale_2", torch.tensor(columns**-0.5 / 3)


# --- models ----------------------------------------------------------------------------------------------
def models(folder: Path) -> dict[str, Any]:
    """Row -> model. Packed weights are shared between rows, dense ones are each row's own."""
    ours = moestro.load(folder, report=False)
    every = copy.deepcopy(ours)
    pack_linears(every)
    head = copy.deepcopy(ours)
    mt.quantize_linear(head, "nvfp4", exclude=())
    experts = copy.deepcopy(ours)
    for name, layer in list(packed_linears(experts)):
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = torch.nn.Parameter(layer.dequantize(BF16), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(experts.get_submodule(parent), leaf, dense)
    theirs = copy.deepcopy(experts)
    for _, module in experts_modules(theirs):
        mt.restore_experts(module, BF16)
        del module.__dict__[LAYER]
    theirs.set_experts_implementation("eager")
    gc.collect()
    return {"transformers": theirs, "experts": experts, "linear": ours, "linear, head bf16": every,
            "linear, head nvfp4": head}  # fmt: skip


def nbytes(model: Any) -> int:
    """Of all weights."""
    packed = [m.nbytes for _, m in packed_linears(model)]
    packed += [found.weights.nbytes for _, m in experts_modules(model) if (found := bound_to(m)) is not None]
    return sum(p.nbytes for p in model.parameters()) + sum(packed)


class Clocks:
    """Seconds inside experts modules and Linear layers."""

    def __init__(self, model: Any) -> None:
        self.spent = {"experts": 0.0, "linear": 0.0}
        self._hooks = [h for _, m in experts_modules(model) for h in self._around(m, "experts")]
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self._hooks += [h for m in linears for h in self._around(m, "linear")]

    def _around(self, module: Any, kind: str) -> list[Any]:
        started: list[float] = []

        def before(*_: Any) -> None:
            started.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.spent[kind] += time.perf_counter() - started.pop()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def parts(self, total: float) -> dict[str, float]:
        """Milliseconds of a whole time: experts, Linear layers, and what is Transformers' own."""
        for hook in self._hooks:
            hook.remove()
        parts = {name: round(1e3 * value, 2) for name, value in self.spent.items()}
        return {**parts, "rest": round(1e3 * total - sum(parts.values()), 2)}


# --- rounds ----------------------------------------------------------------------------------------------
class Contender:
    """One row in one implementation, with a cache of 512 tokens to decode after."""

    def __init__(self, row: str, model: Any, implementation: str) -> None:
        self.name = row if row != "transformers" else f"transformers {implementation}"
        self._model, self._implementation, self._row = model, implementation, row
        self._generator = torch.Generator().manual_seed(1)
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.can_prefill = (
            implementation != "batched_mm"
        )  # copies the experts of every pair: 38 GB at 512 tokens

    def _call(self, count: int, cache: Any) -> float:
        tokens = torch.randint(0, self._model.config.vocab_size, (1, count), generator=self._generator)
        start = time.perf_counter()
        self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def _filled(self) -> tuple[Any, float]:
        cache = transformers.DynamicCache()
        if self._row == "transformers":
            self._model.set_experts_implementation(self._implementation if self.can_prefill else "grouped_mm")
        took = self._call(PROMPT, cache)
        if self._row == "transformers":
            self._model.set_experts_implementation(self._implementation)
        return cache, took

    def round(self) -> None:
        cache, took = self._filled()
        self.prefills.append(took)
        self._call(1, cache)  # weights of another contender are in the caches
        self.steps += [self._call(1, cache) for _ in range(STEPS)]

    def split(self) -> dict[str, dict[str, float]]:
        """Milliseconds by whose they are, of one prefill and of a mean step."""
        cache, _ = self._filled()
        clocks = Clocks(self._model)
        prefill = clocks.parts(self._filled()[1])
        clocks = Clocks(self._model)
        steps = clocks.parts(sum(self._call(1, cache) for _ in range(8)))
        return {"prefill_ms": prefill, "decode_ms": {name: round(ms / 8, 2) for name, ms in steps.items()}}

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "decode_tokens_per_s": 1 / statistics.median(self.steps),
            "decode_ms": [
                round(1e3 * s, 2) for s in (min(self.steps), *statistics.quantiles(self.steps, n=4))
            ],
        }
        if self.can_prefill:
            found["prefill_tokens_per_s"] = PROMPT / statistics.median(self.prefills)
            found["prefill_ms"] = [
                round(1e3 * s, 1) for s in (min(self.prefills), *statistics.quantiles(self.prefills, n=4))
            ]
        return found


def compare(folder: Path, rounds: int, locks: list[Path]) -> dict[str, Any]:
    """All rows: tokens a second, ratios to the best of Transformers', memory, splits, differences of the logits."""
    torch.set_num_threads(1)  # while others may use the machine, threads wait for each other
    loaded = models(folder)
    torch.set_num_threads(2)
    held = [path.open("w") for path in locks]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    contenders = [Contender("transformers", loaded["transformers"], name) for name in IMPLEMENTATIONS]
    contenders += [Contender(row, model, "moestro") for row, model in loaded.items() if row != "transformers"]
    with torch.inference_mode():
        logits = {row: model(torch.arange(16)[None] * 7).logits.float() for row, model in loaded.items()}
        for _ in range(rounds):
            for contender in contenders:
                contender.round()
        splits = {c.name: c.split() for c in contenders if c.can_prefill}
    truth = logits["transformers"]
    rows = {
        c.name: {**c.result(), **{f"split_{k}": v for k, v in splits.get(c.name, {}).items()}}
        for c in contenders
    }
    theirs = [row for name, row in rows.items() if name.startswith("transformers")]
    for name, row in rows.items():
        for what in ("decode_tokens_per_s", "prefill_tokens_per_s"):
            if what in row:
                row[f"{what}_ratio"] = row[what] / max(r[what] for r in theirs if what in r)
        key = "transformers" if name.startswith("transformers") else name
        row["weight_bytes"] = nbytes(loaded[key])
        row["memory_ratio"] = row["weight_bytes"] / nbytes(loaded["transformers"])
        row["logits_difference"] = float((logits[key] - truth).norm() / truth.norm())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=4)
    making.add_argument("--vocab", type=int, default=32768)
    comparing = commands.add_parser("compare")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("--out", type=Path)
    comparing.add_argument("--rounds", type=int, default=10)
    comparing.add_argument("--lock", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.layers, args.vocab)
        return
    result = {
        "command": "python benchmarks/cpu_model.py compare",
        "date": now(),
        "environment": environment("cpu"),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "config": json.loads((args.folder / "config.json").read_text()),
        "rounds": args.rounds,
        "load_average_before": os.getloadavg(),
        "rows": compare(args.folder, args.rounds, args.lock),
        "load_average_after": os.getloadavg(),
    }
    print(
        json.dumps(
            {name: result[name] for name in ("rows", "load_average_before", "load_average_after")}, indent=1
        )
    )
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

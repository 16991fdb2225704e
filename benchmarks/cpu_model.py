"""A model of Qwen3-30B-A3B's shapes from an NVFP4 checkpoint, in Transformers: tokens a second, memory, whose time.

    python benchmarks/cpu_model.py make DIR [--layers 4 --vocab 32768]
    python benchmarks/cpu_model.py measure DIR ROW [--out FILE.json]      # one row a process; see ROWS

The checkpoint (ModelOpt W4A16_NVFP4: experts and attention; head, routers and embedding in bf16) has random weights.
Transformers' rows run the dequantised values of the same checkpoint. Prefill: 512 tokens into an empty cache, logits
of the last one, as generate() does. Decode: one token after those 512, the cache growing. Medians; a row's split is
measured in passes of its own, with a clock around each experts module and each Linear layer. Memory is that of the
weights, and the process's anonymous pages beside it. Logits of 16 fixed tokens go to DIR, for the difference between
rows. MOESTRO_CPU_ISA=avx2 alone limits Moestro; ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 limit torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import moestro
import moestro.integrations.transformers as mt
from moestro.bench.results import environment
from moestro.integrations.transformers.bound import LAYER, bound_to
from moestro.integrations.transformers.modules import experts_modules
from moestro.moe.linear import PackedLinear

PROMPT, STEPS = 512, 24
BF16 = torch.bfloat16
LIMITS = ("MOESTRO_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# row -> (moestro_linear, what is done to the loaded model)
ROWS: dict[str, tuple[bool | None, str]] = {
    "transformers-bf16": (False, "dequantise"),
    "transformers-float32": (False, "dequantise32"),
    "experts": (False, ""),
    "linear": (None, ""),
    "linear-all": (True, ""),
    "linear-head": (None, "head"),
}


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


# --- a row -----------------------------------------------------------------------------------------------
def load(folder: Path, row: str) -> Any:
    """The model of a row."""
    linear, then = ROWS[row]
    model = moestro.load(folder, moestro_linear=linear, report=False)
    if then == "head":
        mt.quantize_linear(model, "nvfp4", exclude=())
    if then.startswith("dequantise"):
        dtype = torch.float32 if then.endswith("32") else BF16
        for _, module in experts_modules(model):
            mt.restore_experts(module, dtype)
            del module.__dict__[LAYER]
        model.set_experts_implementation("eager")
        torch.nn.Module.to(model, dtype)  # Transformers' own refuses models from quantised checkpoints
    gc.collect()
    return model


def nbytes(model: Any) -> int:
    """Of all weights."""
    packed = [m.nbytes for m in model.modules() if isinstance(m, PackedLinear)]
    packed += [found.weights.nbytes for _, m in experts_modules(model) if (found := bound_to(m)) is not None]
    return sum(p.nbytes for p in model.parameters()) + sum(packed)


def anonymous_pages() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Run:
    """Prefills and decodes of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._generator = torch.Generator().manual_seed(1)

    def tokens(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.model.config.vocab_size, (1, count), generator=self._generator)

    def prefill(self) -> tuple[float, Any]:
        cache, tokens = transformers.DynamicCache(), self.tokens(PROMPT)
        took = seconds(lambda: self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1))
        return took, cache

    def decode(self, cache: Any, steps: int) -> list[float]:
        return [
            seconds(
                lambda: self.model(self.tokens(1), past_key_values=cache, use_cache=True, logits_to_keep=1)
            )
            for _ in range(steps)
        ]


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

    def shares(self, total: float) -> dict[str, float]:
        """Of a whole time: experts, Linear layers, and what is Transformers' own."""
        for hook in self._hooks:
            hook.remove()
        parts = {name: round(value / total, 3) for name, value in self.spent.items()}
        return {**parts, "rest": round(1 - sum(parts.values()), 3)}


def measured(model: Any, implementation: str) -> dict[str, Any]:
    """One implementation's figures."""
    run = Run(model)
    prefill = implementation != "batched_mm"  # it copies the experts of every pair: 38 GB at 512 tokens
    if prefill:
        run.prefill()
        times = [run.prefill() for _ in range(4)]
        cache = times[-1][1]
    else:
        cache = transformers.DynamicCache()
        for _ in range(PROMPT // 16):
            model(run.tokens(16), past_key_values=cache, use_cache=True, logits_to_keep=1)
    run.decode(cache, 4)
    steps = run.decode(cache, STEPS)
    clocks = Clocks(model)
    found = {
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "decode_ms": [round(1e3 * s, 2) for s in statistics.quantiles(steps, n=4)],
        "decode_split": clocks.shares(sum(run.decode(cache, 8))),
    }
    if prefill:
        clocks = Clocks(model)
        found["prefill_tokens_per_s"] = PROMPT / statistics.median(t for t, _ in times)
        found["prefill_ms"] = sorted(round(1e3 * t, 1) for t, _ in times)
        found["prefill_split"] = clocks.shares(run.prefill()[0])
    return found


def measure(folder: Path, row: str, implementations: list[str]) -> dict[str, Any]:
    """A row: every implementation that its model has, memory, and the logits beside the checkpoint."""
    torch.set_num_threads(2)
    before = anonymous_pages()
    started = time.perf_counter()
    model = load(folder, row)
    loaded = time.perf_counter() - started
    found: dict[str, Any] = {
        "load_s": round(loaded, 1),
        "weight_bytes": nbytes(model),
        "anonymous_bytes": anonymous_pages() - before,
        "implementations": {},
    }
    with torch.inference_mode():
        logits = model(torch.arange(16)[None] * 7).logits.float()
        torch.save(logits, folder / f"logits-{row}.pt")
        for name in implementations:
            if row.startswith("transformers"):
                model.set_experts_implementation(name)
            found["implementations"][name] = measured(model, name)
    found["differences"] = differences(folder, row)
    return found


def differences(folder: Path, row: str) -> dict[str, float]:
    """Relative norms of this row's logits against the rows measured before."""
    mine = torch.load(folder / f"logits-{row}.pt")
    found = {}
    for path in sorted(folder.glob("logits-*.pt")):
        theirs = torch.load(path)
        found[path.stem.removeprefix("logits-")] = float((mine - theirs).norm() / theirs.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=4)
    making.add_argument("--vocab", type=int, default=32768)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("row", choices=ROWS)
    measuring.add_argument("--implementations", default="eager,batched_mm,grouped_mm")
    measuring.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.layers, args.vocab)
        return
    ours = not args.row.startswith("transformers")
    names = ["moestro"] if ours else args.implementations.split(",")
    result = measure(args.folder, args.row, names)
    print(json.dumps(result, indent=1))
    if args.out is not None:
        limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
        held = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
        held["environment"] = environment("cpu")
        held["limits"] = limits
        held["config"] = json.loads((args.folder / "config.json").read_text())
        held["rows"][args.row] = result
        args.out.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""gpu_served.py decode: eager decode steps of a two-layer Qwen3-MoE in Transformers, and its experts' kernels alone.

Random weights, Qwen3-30B-A3B's shapes (head and embedding of 32768 tokens). The contenders have the same bf16 weights
(Moestro's second row quantises the experts to NVFP4), a cache of their own, and take turns. A step is one token of each
sequence, on the host's clock from the call until the device is idle, after 256 MiB were written (cold L2). The experts
alone are both layers' modules on what they were given in a step, replayed as one CUDA graph.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from cpu_model import config_of
from gpu_served import NEVER, Rows, Target, alternate, compile_all, median_us

import moestro.integrations.transformers as mt
from moestro.bench.timing import timer_for
from moestro.integrations.transformers.modules import experts_modules
from moestro.integrations.transformers.packed import pack
from moestro.integrations.transformers.settings import Settings
from moestro.moe.call import as_inputs

SEQUENCES, PROMPT, VOCABULARY, STEPS = (1, 4, 16, 64), 8, 32768, 15
PEER, FLUSH = "grouped_mm", 256 << 20
HALF = 0.5  # of what the kernels gain, at least, a step gains


def decode(rows: Rows) -> int:
    """A row a contender and number of sequences; Moestro's say what a step and what the experts alone gain."""
    o = rows.options
    models, counts = models_of(o), o.tokens or SEQUENCES
    compiled(models, counts, o.device)
    for count in rows.cells(counts):
        with rows.cell(count), torch.inference_mode():
            _steps(rows, models, count)
    return rows.judged(Target("of_bound", 1.0), lambda row: "of_bound" in row)


def _steps(rows: Rows, models: dict[str, Any], count: int) -> None:
    """The rows of a number of sequences."""
    device = rows.options.device
    steps = {name: Steps(model, count, device) for name, model in models.items()}
    logits = {name: each() for name, each in steps.items()}  # warms up
    step = alternate({name: each.seconds for name, each in steps.items()}, STEPS)
    alone = alternate({name: each.experts_alone() for name, each in steps.items()}, STEPS)
    truth = logits[PEER].float()
    for name in models:
        row: dict[str, Any] = {"sequences": count, "contender": name}
        row |= {"step_us": median_us(step[name]), "experts_us": median_us(alone[name])}
        if name != PEER:
            gains = [median_us(t[PEER]) - median_us(t[name]) for t in (step, alone)]
            held = gains[0] > 0 and gains[1] > 0
            row |= {"step_gain_us": gains[0], "experts_gain_us": gains[1]}
            row["of_bound"] = HALF * gains[1] / gains[0] if held else NEVER
            row["logits_difference"] = float((logits[name].float() - truth).norm() / truth.norm())
        rows.add(**row)


def compiled(models: dict[str, Any], counts: Sequence[int], device: str) -> None:
    """What Moestro's layers run in a prompt and in a step, side by side; the layers of a model are alike."""
    layers = [mt.prepare(model)[0] for name, model in models.items() if name != PEER]
    pairs = []
    for layer in layers:
        for n in sorted({n for count in counts for n in (count, count * PROMPT)}):
            x = torch.zeros(n, layer.weights.hidden_size, dtype=torch.bfloat16, device=device)
            ids = torch.zeros(
                n, layer.top_k, dtype=torch.int64, device=device
            )  # as Transformers' routers give them
            pairs.append(
                (layer, as_inputs(x, ids, torch.zeros(ids.shape, device=device), torch.empty_like(x)))
            )
    compile_all(pairs)


def models_of(o: Any) -> dict[str, Any]:
    """Name -> model, as from_pretrained leaves them: Moestro's experts packed, their own parameters let go."""
    config = config_of(2, VOCABULARY)
    if o.tiny:
        small = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64}
        config = transformers.Qwen3MoeConfig(num_hidden_layers=2, **small, **heads)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(o.device):
            theirs = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    models = {PEER: theirs, "moestro bf16": copy.deepcopy(theirs), "moestro nvfp4": copy.deepcopy(theirs)}
    mt.register()
    for _, module in experts_modules(models["moestro bf16"]):
        pack(module, Settings())
    mt.quantize_experts(models["moestro nvfp4"], "nvfp4")
    theirs.set_experts_implementation(PEER)
    models["moestro bf16"].set_experts_implementation("moestro")
    return models


class Steps:
    """Decode steps of one contender, after a prompt of its own."""

    def __init__(self, model: Any, count: int, device: str) -> None:
        self._model, self._device = model, device
        gen = torch.Generator().manual_seed(count)
        size = model.config.vocab_size
        self._tokens = torch.randint(0, size, (count, PROMPT + 1), generator=gen).to(device)
        self._cache = transformers.DynamicCache()
        model(self._tokens[:, :PROMPT], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        on_gpu = device.startswith("cuda")
        self._flush = torch.empty(FLUSH if on_gpu else 1, dtype=torch.uint8, device=device)
        self._wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None

    def __call__(self) -> torch.Tensor:
        """A step; its logits."""
        found = self._model(self._tokens[:, PROMPT:], past_key_values=self._cache, use_cache=True)
        return found.logits  # type: ignore[no-any-return]

    def seconds(self) -> float:
        """Of a step."""
        self._flush.zero_()
        self._wait()
        start = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - start

    def experts_alone(self) -> Callable[[], float]:
        """A sampler of all experts modules, one after the other, on the inputs of a step."""
        seen: list[tuple[Any, tuple[Any, ...]]] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, args: seen.append((m, tuple(t.clone() for t in args))))
            for _, module in experts_modules(self._model)
        ]
        self()
        for hook in hooks:
            hook.remove()

        def call() -> torch.Tensor:
            return [module(*args) for module, args in seen][-1]  # type: ignore[no-any-return]

        return timer_for(self._device)(None).prepare(call)  # type: ignore[arg-type]

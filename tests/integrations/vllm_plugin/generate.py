"""Runs one model in vLLM and prints what it says as a line of JSON: python generate.py MODEL '{"options": ...}'."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

PROMPTS = [[3 + 7 * i % 500 for i in range(n)] for n in (5, 12, 33)] + [[11, 400, 23, 99, 250, 7]]


def main(model: str, options: dict[str, Any]) -> None:
    if ranks := options.get("tensor_parallel_size"):  # a core each: this machine has one memory node for all
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(ranks))))
    from vllm import LLM, SamplingParams

    tokens = options.pop("tokens", 24)
    prompts = options.pop("prompts", PROMPTS)
    reload = options.pop("reload", False)
    rows = options.pop("rows_alone", False)
    if rows:
        without_vllms_invariant_kernels()
    settings = {"enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8}
    llm = LLM(model, skip_tokenizer_init=True, **{**settings, **options})
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2, detokenize=False)
    if rows:
        print("ROWS " + json.dumps(rows_alone(llm)))
    if reload:
        llm.collective_rpc("reload_weights")
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    print(
        "RESULT "
        + json.dumps(
            {
                "rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "modules": sorted(name for name in sys.modules if name.startswith("moestro")),
                "outputs": [_read(o) for o in outputs],
            }
        )
    )


def without_vllms_invariant_kernels() -> None:
    """vLLM's own operators for VLLM_BATCH_INVARIANT are Triton's, which CPUs have not: its others take their place."""
    from vllm.model_executor.determinism import batch_invariant

    batch_invariant.enable_batch_invariant_mode = lambda: None


def rows_alone(llm: Any) -> dict[str, bool]:
    """For each layer of experts of the engine's model, whether 33 tokens at once give the bits of each alone."""
    import torch

    engine = llm.llm_engine.engine_core.engine_core.model_executor
    model = engine.driver_worker.worker.model_runner.model
    found = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not hasattr(method, "quantize_to"):  # not ours
            continue
        g = torch.Generator().manual_seed(0)
        x = torch.randn(33, method.moe.hidden_dim, generator=g).to(method.moe.in_dtype)
        logits = torch.randn(33, method.moe.num_experts, generator=g)
        weights, ids = logits.softmax(-1).topk(method.moe.experts_per_token)
        with torch.inference_mode():
            whole = method.apply(layer, x, weights, ids.int())
            alone = [
                method.apply(layer, x[n : n + 1], weights[n : n + 1], ids[n : n + 1].int()) for n in range(33)
            ]
        found[name] = torch.equal(whole, torch.cat(alone))
    return found


def _read(output: Any) -> dict[str, Any]:
    """The tokens, and at each step the best two tokens' logprobs."""
    one = output.outputs[0]
    steps = [sorted(((v.logprob, t) for t, v in step.items()), reverse=True)[:2] for step in one.logprobs]
    return {"tokens": list(one.token_ids), "best": steps}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})

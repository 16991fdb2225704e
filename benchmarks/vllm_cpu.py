"""Tokens/s and memory of vLLM on a CPU with its own experts and with Moestro's: a model of two layers whose experts
have Qwen3-30B-A3B's shape (E 128, K 8, H 2048, I 768; attention as there; a vocabulary of 8192; random weights).

    python benchmarks/vllm_cpu.py models DIR                      # writes the bf16 and the NVFP4 (ModelOpt) model
    python benchmarks/vllm_cpu.py run DIR --json benchmarks/results/vllm_cpu.json
    python benchmarks/vllm_cpu.py run DIR --isa avx2 --json ...   # all of them held to AVX2: Moestro, vLLM's library,
                                                                  # torch, oneDNN

Needs vLLM beside Moestro (docs/vllm.md). Each contender is a process of its own, one after the other, eager.
Decode: from the second to the last of 41 tokens of prompts with 16, greedy. Prefill: prompts of that many tokens,
no prefix cache. Medians over repeats; of --rounds of all contenders in turn the best (what else runs on a machine only
takes away; the record has each round). Memory: resident before the engine, with weights loaded, and the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CONTENDERS = {  # name -> (model, MOESTRO_VLLM)
    "vLLM bf16": ("bf16", "0"),
    "Moestro bf16": ("bf16", "1"),
    "Moestro NVFP4": ("nvfp4", "1"),
}
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
BATCHES, PREFILLS, DECODED, REPEATS = (1, 16), (128, 2048), 40, 3


def make_models(root: Path) -> None:
    """DIR/bf16 and DIR/nvfp4."""
    import transformers
    from safetensors.torch import load_file, save_file

    from moestro.formats import NVFP4

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, architectures=["Qwen3MoeForCausalLM"])
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(root / "bf16", max_shard_size="100GB")
    del model
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(root / "bf16" / "model.safetensors").items():
        if ".experts." not in name:
            packed[name] = tensor
            continue
        q = NVFP4.quantize(tensor)
        packed |= {name: q.packed, f"{name}_scale": q.scale, f"{name}_scale_2": q.global_scale}
    (root / "nvfp4").mkdir(exist_ok=True)
    save_file(packed, root / "nvfp4" / "model.safetensors", {"format": "pt"})
    said = json.loads((root / "bf16" / "config.json").read_text())
    ignore = [
        "lm_head",
        *(f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn*", "mlp.gate")),
    ]
    said["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ignore}
    (root / "nvfp4" / "config.json").write_text(json.dumps(said))


def memory() -> dict[str, float]:
    """Resident MiB of this process now, and at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {row.split(":")[0]: int(row.split()[1]) for row in lines if row.startswith(("VmRSS", "VmHWM"))}
    return {"now": round(kib["VmRSS"] / 1024), "peak": round(kib["VmHWM"] / 1024)}


def hold_to_avx2() -> None:
    """vLLM's library for AVX2, where it would take that for AVX-512; called before vLLM is imported."""
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: False)


AVX2 = {"MOESTRO_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def loaded_libraries() -> list[str]:
    """vLLM's compiled libraries in this process, which say its instructions."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({Path(row.split()[-1]).name for row in lines if "/vllm/_C" in row})


def measure(model: str) -> dict[str, Any]:
    """One contender, in this process."""
    if os.environ.get("MOESTRO_CPU_ISA") == "avx2":
        hold_to_avx2()
    from vllm import LLM, SamplingParams

    before = memory()["now"]
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2304,
        max_num_batched_tokens=2048,
        max_num_seqs=max(BATCHES),
    )
    loaded = memory()
    make = torch.Generator().manual_seed(1)

    def seconds(batch: int, length: int, tokens: int) -> float:
        ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=make).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return time.perf_counter() - began

    seconds(1, 128, 4)
    decode, prefill = {}, {}
    for batch in BATCHES:
        times = [seconds(batch, 16, 1 + DECODED) - seconds(batch, 16, 1) for _ in range(REPEATS)]
        decode[batch] = round(batch * DECODED / statistics.median(times), 1)
    for length in PREFILLS:
        prefill[length] = round(length / statistics.median(seconds(1, length, 1) for _ in range(REPEATS)), 1)
    mib = {"before": before, "loaded": loaded["now"], "peak": memory()["peak"]}
    instructions = {"torch": torch.backends.cpu.get_cpu_capability(), "vLLM": loaded_libraries()}
    return {
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": prefill,
        "resident_mib": mib,
        "instructions": instructions,
    }


def contender(root: Path, name: str, isa: str | None, through: list[str]) -> dict[str, Any]:
    """A contender's figures, from a process of its own."""
    model, plugin = CONTENDERS[name]
    env = {
        **os.environ,
        **(AVX2 if isa == "avx2" else {}),
        "MOESTRO_VLLM": plugin,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    code = [*through, sys.executable, __file__, "measure", str(root / model)]
    done = subprocess.run(code, env=env, capture_output=True, text=True, check=False)
    lines = [row for row in done.stdout.splitlines() if row.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(lines[0][7:])
    print(name, json.dumps(found), flush=True)
    return found


def best_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The best figures of the rounds, and the rounds."""
    result = dict(rounds[-1])
    for kind in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        result[kind] = {n: max(r[kind][n] for r in rounds) for n in rounds[0][kind]}
    return {**result, "rounds": [{k: v for k, v in r.items() if k.endswith("per_s")} for r in rounds]}


def run(root: Path, target: Path | None, through: list[str], isa: str | None, rounds: int) -> None:
    """All contenders in turn, one process each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            found[name].append(contender(root, name, isa, through))
    results = {name: best_of(of) for name, of in found.items()}
    cpu = next(
        row.split(":")[1].strip()
        for row in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in row
    )
    record = {
        "command": "python benchmarks/vllm_cpu.py models DIR; python benchmarks/vllm_cpu.py run DIR"
        + (f" --isa {isa}" if isa else "")
        + f" --rounds {rounds}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": cpu,
        "threads": os.cpu_count(),
        "isa": isa or "the machine's best",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "moestro")}
        | {"python": platform.python_version()},
        "model": SIZES,
        "results": results,
    }
    if target is not None:
        target.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["models", "run", "measure"])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--through", default="", help="a command to run each contender through")
    args = parser.parse_args()
    if args.what == "models":
        make_models(args.dir)
    elif args.what == "measure":
        print("RESULT " + json.dumps(measure(str(args.dir))))
    else:
        run(args.dir, args.json, args.through.split(), args.isa, args.rounds)


if __name__ == "__main__":
    main()

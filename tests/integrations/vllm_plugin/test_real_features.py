"""The plugin under settings of vLLM's, in vLLM itself on CPUs. `make test-vllm` runs these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from compare import assert_same, serves
from typer.testing import CliRunner
from vllm_runs import NO_VLLM, Run, run_vllm, vllm_is_there

if not vllm_is_there():
    pytest.skip(NO_VLLM, allow_module_level=True)

Models = Callable[[str], Path]


def test_float16(run: Run, models: Models) -> None:
    said = run(models("qwen3-modelopt"), dtype="float16")
    assert serves(said, "nvfp4")
    assert_same(said, run(models("qwen3-dense"), plugin=False, dtype="float16"))


def test_prefill_in_chunks(run: Run, models: Models) -> None:
    """Prompts of 5, 12, 33 and 6 tokens, 16 tokens a step: in float32 the same as in one."""
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    said = run(models("qwen3-compressed"), dtype="float32", **options)
    assert serves(said, "nvfp4")
    assert said.tokens == run(models("qwen3-compressed"), dtype="float32").tokens


def test_a_layer_that_the_checkpoint_excludes_is_served_in_bf16(
    run: Run, models: Models, tmp_path: Path
) -> None:
    import tiny_models

    packed, dense = tmp_path / "packed", tmp_path / "dense"
    tiny_models.nvfp4(models("qwen3"), packed, dense, kept_layer="model.layers.1")
    said = run(packed)
    assert serves(said, "nvfp4")
    assert serves(said, "bf16")
    assert_same(said, run(dense, plugin=False))


@pytest.mark.parametrize("name", ["qwen3-modelopt", "qwen3"])
def test_batch_invariance_gives_rows_their_bits_in_any_batch(run: Run, models: Models, name: str) -> None:
    """In vLLM's own layers, with its own operators for it (Triton's) left out."""
    said = run(models(name), environ={"VLLM_BATCH_INVARIANT": "1"}, tokens=2, rows_alone=True)
    line = next(row for row in said.log.splitlines() if row.startswith("ROWS "))
    rows = json.loads(line[5:])
    assert len(rows) == 2
    assert all(rows.values())
    assert "backend, rows the same in any batch; decisions" in said.log


def test_batch_invariance_ends_on_cpus_in_vllms_own_operators(models: Models) -> None:
    """What docs/vllm.md says: not in the experts, and without Moestro no sooner."""
    done = run_vllm(models("qwen3-modelopt"), {"VLLM_BATCH_INVARIANT": "1"}, {"tokens": 2})
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "moestro: serves nvfp4 experts" in said
    assert "mean_batch_invariant" in said
    alone = run_vllm(models("qwen3"), {"VLLM_BATCH_INVARIANT": "1", "MOESTRO_VLLM": "0"}, {"tokens": 2})
    assert "No Unquantized MoE backend supports the deployment configuration" in alone.stdout + alone.stderr


def test_eplb_is_refused_by_vllm_on_cpus(models: Models) -> None:
    """Where vLLM has it, the plugin leaves such layers with one line (test_plugin.py)."""
    options = {"enable_eplb": True, "enable_expert_parallel": True, "tensor_parallel_size": 2}
    done = run_vllm(models("qwen3-modelopt"), {}, options)
    assert done.returncode != 0
    assert "Expert parallelism load balancing is only supported on CUDA devices" in done.stdout + done.stderr


def test_sleep_mode_is_refused_by_vllm_on_cpus(models: Models) -> None:
    done = run_vllm(models("qwen3-modelopt"), {}, {"enable_sleep_mode": True})
    assert done.returncode != 0
    assert "Sleep mode is not supported on current platform" in done.stdout + done.stderr


def test_what_served_is_explained_from_the_log_and_the_misses(
    run: Run, models: Models, tmp_path: Path
) -> None:
    """Tuned for 16 tokens a step, then served with 512."""
    from moestro.cli.app import app

    store = {"MOESTRO_VLLM_STORE": str(tmp_path / "store")}
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 128, "tokens": 2}
    prompts = [[3 + 7 * i % 500 for i in range(60)]]
    run(models("qwen3-modelopt"), environ={**store, "MOESTRO_VLLM_TUNE_S": "4"}, **small)
    said = run(models("qwen3-modelopt"), environ=store, tokens=2, prompts=prompts)
    (tmp_path / "server.log").write_text(said.log)
    done = CliRunner().invoke(app, ["explain", "--vllm", str(tmp_path / "server.log")])
    assert done.exit_code == 0, done.output
    assert "nvfp4 experts (E 8, local 8, K 2, H 128, I 64) on the cpu backend" in done.output
    assert "(extrapolated at 16)" in done.output
    assert "beyond what was tuned: 60 tokens, served by the decision for 16" in done.output

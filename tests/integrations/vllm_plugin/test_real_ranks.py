"""The plugin in vLLM itself, over two processes: tensor, expert and data parallel. `make test-vllm` runs these.

vLLM 0.32's own bf16 experts take no expert_map on CPUs: with enable_expert_parallel its processes die in the kernel.
So what runs here expert-parallel is compared with vLLM's own experts in one process, in float32: each rank's bf16 sum
rounds once more before the ranks' are added, and a random model's router turns on less than that.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cpu_collectives
import pytest
from compare import assert_equal, assert_same, serves
from vllm_runs import GENERATE, LIMIT_S, NO_VLLM, Run, Said, said_of, vllm_is_there

if not vllm_is_there():
    pytest.skip(NO_VLLM, allow_module_level=True)

Models = Callable[[str], Path]
EXPERT = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


def lines(said: Said) -> dict[str, str]:
    """Process -> what serves in it."""
    return dict(re.findall(r"\((Worker_\S+) pid=\d+\).*moestro: serves (.*)", said.log))


def test_nvfp4_tensor_parallel_gives_what_the_dequantised_model_gives_in_vllms_own(
    run: Run, models: Models
) -> None:
    said = run(models("qwen3-modelopt"), tensor_parallel_size=2)
    assert serves(said, "nvfp4")
    assert "(E 8, local 8, K 2, H 128, I 32" in said.log
    assert_same(said, run(models("qwen3-dense"), plugin=False, tensor_parallel_size=2))


@pytest.mark.parametrize("family", ["qwen3", "glm4"])  # glm4: shared experts, a scaling factor
def test_expert_parallel_gives_what_vllms_own_experts_give(family: str, run: Run, models: Models) -> None:
    said = run(models(f"{family}-compressed"), dtype="float32", **EXPERT)
    assert serves(said, "nvfp4")
    assert set(lines(said)) == {"Worker_TP0_EP0", "Worker_TP1_EP1"}
    assert "(E 8, local 4, K 2, H 128, I 64" in said.log
    assert_equal(said, run(models(f"{family}-dense"), plugin=False, dtype="float32"))


def test_expert_parallel_bf16_experts_give_what_packed_ones_give(run: Run, models: Models) -> None:
    packed, dense = (run(models(f"qwen3-{kind}"), **EXPERT) for kind in ("modelopt", "dense"))
    assert serves(dense, "bf16")
    assert (packed.tokens, packed.best) == (dense.tokens, dense.best)


def test_two_ranks_tune_together_and_serve_the_same_decisions(
    run: Run, models: Models, tmp_path: Path
) -> None:
    environ = {"MOESTRO_VLLM_STORE": str(tmp_path / "store"), "MOESTRO_VLLM_TUNE_S": "4"}
    said = run(models("qwen3-compressed"), environ=environ, dtype="float32", **EXPERT)
    found = lines(said)
    assert set(found) == {"Worker_TP0_EP0", "Worker_TP1_EP1"}
    assert len(set(found.values())) == 1
    assert "of all ranks: " in said.log
    assert "(measured at " in said.log
    assert_equal(said, run(models("qwen3-dense"), plugin=False, dtype="float32"))


def test_data_parallel_with_a_rank_that_runs_dummy_batches(run: Run, models: Models, tmp_path: Path) -> None:
    """Rank 1 has one short prompt and then dummy batches of one token; rank 0 goes on."""
    path = cpu_collectives.entry_point(tmp_path / "site")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    short = {"tokens": 6, "prompts": [[11, 400, 23, 99, 250, 7]]}
    ranks = []
    for rank, options in enumerate(({}, short)):
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_SIZE": "2",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "MOESTRO_VLLM": "1",
        }
        given = json.dumps({"enable_expert_parallel": True, "dtype": "float32", **options})
        code = [sys.executable, str(GENERATE), str(models("qwen3-compressed")), given]
        ranks.append(
            subprocess.Popen(
                code,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        first, second = (said_of(one.communicate(timeout=LIMIT_S)[0], one.returncode) for one in ranks)
    finally:
        for one in ranks:
            one.kill()
    assert serves(first, "nvfp4")
    assert "(E 8, local 4, K 2" in first.log
    alone = run(models("qwen3-dense"), plugin=False, dtype="float32")
    assert_equal(first, alone)
    assert second.tokens[0] == alone.tokens[3][:6]

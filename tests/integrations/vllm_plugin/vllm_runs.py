"""Runs of vLLM in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENERATE = Path(__file__).with_name("generate.py")
LIMIT_S = 400  # 10 to 25 s on two quiet cores
NO_VLLM = "vLLM is not installed here: `make test-vllm` runs these tests in an environment of its own"


def vllm_is_there() -> bool:
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # a folder of that name is no vLLM


@dataclass(frozen=True)
class Said:
    """What a run of vLLM said: tokens of each prompt, (logprob, token) of the best two at each step, its log."""

    tokens: list[list[int]]
    best: list[list[list[tuple[float, int]]]]
    rss_kib: int
    log: str
    modules: list[str]  # of ours, imported in that process


Run = Callable[..., Said]


def said_of(log: str, status: int | None) -> Said:
    """What generate.py printed. AssertionError with its log where it failed: the errors and the end."""
    line = next((row for row in log.splitlines() if row.startswith("RESULT ")), None)
    if status != 0 or line is None:
        errors = "\n".join(row[:300] for row in log.splitlines() if "ERROR" in row or "Error" in row)
        raise AssertionError(f"status {status}\n{errors[:4000]}\n...\n{log[-2000:]}")
    said = json.loads(line[7:])
    best = [[[tuple(pair) for pair in step] for step in o["best"]] for o in said["outputs"]]
    return Said([o["tokens"] for o in said["outputs"]], best, said["rss_kib"], log, said["modules"])


def run_vllm(
    model: Path, environ: dict[str, str], options: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """One run of generate.py. environ: beside this process' own."""
    code = [sys.executable, str(GENERATE), str(model), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "2", **environ}
    return subprocess.run(code, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=env)

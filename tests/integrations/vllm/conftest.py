"""Models, made once, and runs of vLLM in processes of their own."""

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

import pytest

GENERATE = Path(__file__).with_name("generate.py")
LIMIT_S = 280
NO_VLLM = "vLLM is not installed here: `make test-vllm` runs these tests in an environment of its own"


def vllm_is_there() -> bool:
    return importlib.util.find_spec("vllm") is not None


@dataclass(frozen=True)
class Said:
    """What a run of vLLM said: tokens of each prompt, (logprob, token) of the best two at each step, its log."""

    tokens: list[list[int]]
    best: list[list[list[tuple[float, int]]]]
    rss_kib: int
    log: str


Run = Callable[..., Said]


def run_vllm(
    model: Path, environ: dict[str, str], options: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """One run of generate.py. environ: beside this process' own."""
    code = [sys.executable, str(GENERATE), str(model), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "2", **environ}
    return subprocess.run(code, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=env)


@pytest.fixture(scope="session")
def run() -> Run:
    """run(model, plugin=True, environ={...}, **options of LLM) -> Said; the same run is made once."""
    made: dict[str, Said] = {}

    def once(model: Path, plugin: bool = True, environ: dict[str, str] | None = None, **options: Any) -> Said:
        key = json.dumps([str(model), plugin, environ, options])
        if key not in made:
            done = run_vllm(model, {"MOESTRO_VLLM": str(int(plugin)), **(environ or {})}, options)
            log = done.stdout + done.stderr
            line = next((row for row in done.stdout.splitlines() if row.startswith("RESULT ")), None)
            assert done.returncode == 0 and line is not None, log[-4000:]  # noqa: PT018
            said = json.loads(line[7:])
            outputs = said["outputs"]
            best = [[[tuple(pair) for pair in step] for step in o["best"]] for o in outputs]
            made[key] = Said([o["tokens"] for o in outputs], best, said["rss_kib"], log)
        return made[key]

    return once


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """models("qwen3"), ("qwen3-modelopt"), ("gptoss-mxfp4") ...: a folder, made when first asked for."""
    import tiny_models

    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        at = root / name
        if at.exists():
            return at
        family, _, kind = name.partition("-")
        if not kind:
            return tiny_models.bf16(at, family)
        source, dense = folder(family), root / f"{family}-dense"
        if kind == "mxfp4" or (kind == "dense" and family == "gptoss"):
            tiny_models.mxfp4(source, root / f"{family}-mxfp4", dense)
        elif kind in ("modelopt", "dense"):
            tiny_models.nvfp4(source, root / f"{family}-modelopt", dense)
        else:  # "compressed", "compressed_w4a4", "modelopt_w4a4"
            layout, _, w4a4 = kind.partition("_")
            tiny_models.nvfp4(source, at, None, layout, "NVFP4" if w4a4 else "W4A16_NVFP4")
        return at

    return folder

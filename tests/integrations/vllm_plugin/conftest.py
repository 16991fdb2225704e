"""Models, made once, and what vLLM says of them, asked once; the plugin by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_runs import Run, Said, run_vllm, said_of

from moestro.integrations.vllm import log, ranks


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh log, and no other ranks to talk to (test_ranks.py has them)."""
    log.forget()
    monkeypatch.setattr(ranks, "link", lambda moe: None)


@pytest.fixture(scope="session")
def run() -> Run:
    """run(model, plugin=True, environ={...}, **options of LLM) -> Said; the same run is made once."""
    made: dict[str, Said] = {}

    def once(model: Path, plugin: bool = True, environ: dict[str, str] | None = None, **options: Any) -> Said:
        key = json.dumps([str(model), plugin, environ, options])
        if key not in made:
            done = run_vllm(model, {"MOESTRO_VLLM": str(int(plugin)), **(environ or {})}, options)
            made[key] = said_of(done.stdout + done.stderr, done.returncode)
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

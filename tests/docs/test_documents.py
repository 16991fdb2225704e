"""The Python in the documents runs as it stands there, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.formats import NVFP4

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text())


def names_of_formats() -> dict[str, Any]:
    """What docs/formats.md takes as given: dense tensors, and pieces of checkpoints."""
    q = NVFP4.quantize(torch.randn(32, 64))
    return {
        "torch": torch,
        "experts": torch.randn(4, 32, 64),
        "gate": q,
        "up": q,
        "x": torch.randn(3, 64),
        "weight": q.packed,
        "weight_scale": q.scale,
        "weight_scale_2": q.global_scale,
        "weight_packed": q.packed,
        "weight_global_scale": (1 / q.global_scale).reshape(1),
        "num_tokens": 5,
        "num_experts": 8,
        "top_k": 2,
        "seed": 0,
    }


@pytest.mark.parametrize(
    "name", ["README.md", "docs/quickstart.md", "docs/numerics.md", "docs/formats.md", "docs/migrate.md"]
)
def test_the_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESTRO_STORE", str(tmp_path / "store"))
    torch.manual_seed(0)
    names: dict[str, Any] = names_of_formats() if name == "docs/formats.md" else {}
    blocks = blocks_of(ROOT / name)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{name}: {block.splitlines()[0]}", "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert missing == []

"""docs/tuning.md: its kernel in 30 lines runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "tuning.md"


def test_your_own_kernel_in_thirty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) - 1 <= 30  # less the import's second line
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs_tuning"}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    assert torch.allclose(names["y"], names["x"].sum(-1), atol=1e-4)
    assert "row_sum at size 50: RowSum, tactic" in capsys.readouterr().out
    assert list((tmp_path / "decisions").rglob("64.json"))


def test_every_option_of_autotune_is_documented() -> None:
    import inspect

    from moestro.tuning import AutoTuner

    text = DOCUMENT.read_text()
    options = set(inspect.signature(AutoTuner.autotune).parameters) - {"self"}
    assert {name for name in options if f"`{name}`" not in text} == set()

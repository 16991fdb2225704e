"""The shape of the house: which package may import which, and how large a room may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "moestro"
EVERYONE = {"errors", "machine", "workers"}
# package -> the packages of ours that it may import, besides itself and errors
ALLOWED = {
    "errors": set(),
    "machine": set(),
    "workers": set(),
    "tuning": set(),
    "formats": {"tuning"},
    "routing": {"tuning"},
    "kernels": {"tuning", "formats", "routing"},
    "checkpoints": {"tuning", "formats", "kernels"},
    "moe": {"tuning", "formats", "routing", "kernels"},
    "parallel": {"tuning", "formats", "routing", "kernels", "moe"},
    "integrations": {"tuning", "formats", "routing", "kernels", "moe", "checkpoints", "parallel"},
    "bench": {"tuning", "formats", "routing", "kernels", "moe", "checkpoints", "parallel", "integrations"},
}
ALLOWED["compat"] = {"tuning"}
ALLOWED["cli"] = {*ALLOWED["bench"], "bench"}
TOP = {*ALLOWED}  # `import moestro` itself, for the public names, from the layers above the operator
ABOVE_OPERATOR = {"parallel", "integrations", "bench", "cli"}


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "moestro" else {node.module}
    return {name for name in found if name.split(".")[0] == "moestro"}


def modules() -> list[Path]:
    return sorted(p for p in SRC.rglob("*.py") if p.parent != SRC or p.stem in EVERYONE)


def test_dependencies_point_one_way() -> None:
    wrong = []
    for path in modules():
        here = path.relative_to(SRC).parts[0].removesuffix(".py")
        for name in sorted(imports_of(path)):
            there = package_of(name)
            if there in {here, *EVERYONE} or there in ALLOWED.get(here, set()):
                continue
            if there not in TOP and here in ABOVE_OPERATOR:
                continue  # a public name of `moestro`
            wrong.append(f"{path.relative_to(SRC)} imports {name}")
    assert wrong == []


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from moestro.cli import app\n    return app\n")
    assert imports_of(bad) == {"moestro.cli"}


def test_files_stay_under_four_hundred_lines() -> None:
    large = {str(p.relative_to(SRC)): n for p in modules() if (n := len(p.read_text().splitlines())) > 420}
    assert large == {}


@pytest.mark.parametrize("module", ["moestro.tuning", "moestro.errors"])
def test_imports_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

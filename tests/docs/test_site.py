"""The documents as a site, built strictly: a link that leads nowhere fails, and so does an error without a cure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moestro import errors
from moestro.compat.flashinfer.autotuner.files import NoFileError
from moestro.tuning.race.rounds import ClockError
from moestro.tuning.spec.buckets import BucketError

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install moestro[docs]")
    pytest.importorskip("mkdocstrings", reason="pip install moestro[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    for name in (
        "moestro.moe.layer.FusedMoE",
        "moestro.checkpoints.convert.convert",
        "moestro.errors.FormatError",
    ):
        assert f'id="{name}"' in api
    assert "refresh" in api


def raised() -> set[str]:
    """The names of everything that the package raises or warns with."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            target = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(target, ast.Call) and isinstance(target.func, ast.Name):
                found.add(target.func.id)
            if isinstance(node, ast.Name) and node.id.endswith("Warning"):
                found.add(node.id)
    return found


def test_every_error_has_its_cure() -> None:
    ours = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, MOESTRO)}
    ours |= {BucketError.__name__, ClockError.__name__, NoFileError.__name__}
    text = (ROOT / "docs/troubleshooting.md").read_text()
    missing = sorted(name for name in ours & (raised() | {"MoestroError"}) if f"| `{name}` |" not in text)
    assert missing == []


MOESTRO = (errors.MoestroError, errors.StoreWarning, errors.TuningWarning, errors.CheckpointWarning)


def test_a_new_error_class_would_be_found() -> None:
    """Classes of errors that stand elsewhere than errors.py are counted above."""
    elsewhere = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and file.name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if bases & {n for n, c in vars(errors).items() if isinstance(c, type)} - {"Any"}:
                    elsewhere.add(node.name)
    assert elsewhere == {"BucketError", "ClockError", "NoFileError"}


def test_the_page_of_a_package_index_has_no_link_into_the_repository() -> None:
    code = "import sys; sys.argv = ['setup.py', '--long-description']; exec(open('setup.py').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "](docs/" not in done.stdout
    assert "](benchmarks/" not in done.stdout
    assert "![" not in done.stdout
    assert "Quickstart" in done.stdout

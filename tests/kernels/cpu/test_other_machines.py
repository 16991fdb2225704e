"""The core compiles for a machine that is not here: 64-bit ARM, by a cross compiler if one is installed."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_sanitized import ROOT, setup_module_of_the_package

AARCH64 = 183  # e_machine of ELF


def cross_compiler() -> list[str] | None:
    """g++ for ARM (Debian's g++-aarch64-linux-gnu), or the clang in the ziglang package."""
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return [gcc]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.slow
@pytest.mark.skipif(
    cross_compiler() is None,
    reason="no cross compiler: apt install g++-aarch64-linux-gnu, or pip install ziglang",
)
def test_the_core_compiles_for_64_bit_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = setup_module_of_the_package(monkeypatch)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    sources = [ROOT / source for source in build.sources()]
    assert not {source.name for source in sources} & set(build.X86)
    compiler = cross_compiler()
    assert compiler is not None
    for source in sources:
        target = tmp_path / f"{source.stem}.o"
        command = [*compiler, *build.COMMON.split(), "-Werror", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert int.from_bytes(target.read_bytes()[18:20], "little") == AARCH64

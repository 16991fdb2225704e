"""The core compiles for machines that are not here, and what it cannot be built for is told at once."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulated import cross_compiler, run
from setuptools.errors import CompileError
from test_sanitized import CXX, ROOT, setup_module_of_the_package

AARCH64 = 183  # e_machine of ELF
MACH_O_ARM64 = bytes.fromhex("cffaedfe0c000001")  # the magic number and CPU_TYPE_ARM64
X86_FILES = {"kernels_avx2.cpp", "kernels_avx_vnni.cpp", "kernels_avx512.cpp", "kernels_amx.cpp"}
ARM_FILES = {"kernels_neon.cpp", "kernels_neon_dot.cpp", "kernels_neon_bf16.cpp"}


@pytest.mark.parametrize(
    ("machine", "own"),
    [
        *((name, X86_FILES) for name in ("x86_64", "AMD64")),
        *((name, ARM_FILES) for name in ("aarch64", "arm64")),
        ("riscv64", set()),
    ],
)
def test_a_machine_gets_the_files_of_its_instruction_sets(
    machine: str, own: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = setup_module_of_the_package(monkeypatch)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = {Path(source).name for source in build.sources()}
    assert found & (X86_FILES | ARM_FILES) == own == set(build.isa_flags())
    assert {"kernels_generic.cpp", "kernels_amx_emulated.cpp", "moe.cpp", "dispatch.cpp"} <= found
    assert build.why_not() is None


@pytest.mark.parametrize(("byteorder", "maxsize"), [("big", 2**63 - 1), ("little", 2**31 - 1)])
def test_a_build_for_32_bits_or_big_endian_is_refused_with_a_reason(
    byteorder: str, maxsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = setup_module_of_the_package(monkeypatch)
    monkeypatch.setattr(sys, "byteorder", byteorder)
    monkeypatch.setattr(sys, "maxsize", maxsize)
    bits = maxsize.bit_length() + 1
    with pytest.raises(CompileError, match=rf"is {byteorder}-endian, this Python has {bits} bits"):
        build.BuildCore.build_extension(None, None)


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"], "little-endian processors"),
        (
            ["-UUINTPTR_MAX", "-DUINTPTR_MAX=0xFFFFFFFF", "-D_STDINT_H", "-DUINT64_MAX=~0ull"],
            "64-bit processors",
        ),
    ],
)
def test_the_header_refuses_what_panels_are_not_for(flags: list[str], message: str) -> None:
    header = ROOT / "src/moestro/kernels/cpu/csrc/moestro_cpu.h"
    done = subprocess.run([CXX, "-E", "-w", *flags, str(header)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr


def compile_for(compiler: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The first bytes of each object file of the core for 64-bit ARM."""
    build = setup_module_of_the_package(monkeypatch)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    heads = []
    for source in map(Path, build.sources()):
        target = folder / f"{source.stem}.o"
        own = build.isa_flags().get(source.name, "").split()
        common = build.COMMON.replace("-O3", "-O1").split()
        run([*compiler, *common, *own, "-Werror", "-c", str(ROOT / source), "-o", str(target)])
        heads.append(target.read_bytes()[:20])
    return heads


@pytest.mark.slow
@pytest.mark.skipif(
    cross_compiler() is None,
    reason="no cross compiler: apt install g++-aarch64-linux-gnu, or pip install ziglang",
)
def test_the_core_compiles_for_64_bit_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cross_compiler()
    assert compiler is not None
    heads = compile_for(compiler, tmp_path, monkeypatch)
    assert {int.from_bytes(head[18:20], "little") for head in heads} == {AARCH64}


@pytest.mark.slow
def test_the_core_compiles_for_apples_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang", reason="no compiler for macOS: pip install ziglang")
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos"]
    heads = compile_for(compiler, tmp_path, monkeypatch)
    assert {head[:8] for head in heads} == {MACH_O_ARM64}

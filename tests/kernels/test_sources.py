"""What makes a tuning decision out of date: the device code of each backend, and nothing else of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moestro.kernels.cpu import CpuRunner
from moestro.kernels.portable import PortableRunner
from moestro.kernels.problem import MoeRunner
from moestro.kernels.triton import TritonRunner, chip, runner
from moestro.tuning.store.sources import file_digests, source_digest


def sources(kind: type[MoeRunner]) -> set[str]:
    return {path.name for path in kind.kernel_sources()}


def test_a_backends_sources_are_its_device_code() -> None:
    assert sources(PortableRunner) == set()  # PyTorch's, whose version is in the environment
    assert {"moe.cpp", "kernels.h"} <= sources(CpuRunner)
    assert "runner.py" not in sources(CpuRunner)
    assert {"common.py", "fused.py", "warp_specialized.py"} <= sources(TritonRunner)
    assert not {"runner.py", "choose.py", "call.py"} & sources(TritonRunner)


@pytest.mark.parametrize(("capability", "counts"), [((9, 0), False), ((10, 0), True), ((12, 0), False)])
def test_kernels_of_one_chip_alone_count_there_alone(
    capability: tuple[int, int], counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip, "capability", lambda: capability)
    assert ("fp8_mx.py" in sources(TritonRunner)) == counts


@pytest.mark.parametrize(("capability", "counts"), [((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_cuda_counts_on_hopper_for_which_it_is_compiled(
    capability: tuple[int, int], counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip, "capability", lambda: capability)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    (tmp_path / "device").mkdir()
    for name in ("product.cu", "fused.py", "notes.txt"):
        (tmp_path / "device" / name).write_text("")
    assert sources(TritonRunner) == {"fused.py", "product.cu"} - (set() if counts else {"product.cu"})


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the Triton package in whose place TritonRunner finds its sources."""
    copy = tmp_path / "triton"
    shutil.copytree(Path(TritonRunner.kernel_sources()[0]).parents[1], copy)
    code = (".py", ".cu", ".cuh")
    found = classmethod(lambda cls: sorted(p for p in (copy / "device").iterdir() if p.suffix in code))
    monkeypatch.setattr(TritonRunner, "kernel_sources", found)
    file_digests.cache_clear()
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    file_digests.cache_clear()


def test_host_code_comments_and_imports_leave_the_digest_as_it_is(kernels: Path) -> None:
    before = source_digest([TritonRunner])
    edit(kernels / "choose.py", "FACTOR", "LIMIT")
    edit(kernels / "device" / "chain.py", '"""Both products', '"""The two products')
    edit(
        kernels / "device" / "chain.py",
        "import triton.language as tl",
        "import triton.language as tl\nimport math",
    )
    assert source_digest([TritonRunner]) == before


def test_moving_a_kernel_to_another_file_leaves_the_digest_as_it_is(kernels: Path) -> None:
    before = source_digest([TritonRunner])
    (kernels / "device" / "chain.py").rename(kernels / "device" / "both.py")
    file_digests.cache_clear()
    assert source_digest([TritonRunner]) == before


def test_one_character_of_a_device_function_changes_the_digest(kernels: Path) -> None:
    before = source_digest([TritonRunner])
    edit(kernels / "device" / "chain.py", "slots * STRIPS1", "slots + STRIPS1")
    assert source_digest([TritonRunner]) != before


def test_of_cuda_comments_and_empty_lines_do_not_count_and_code_does(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    path.write_text('// a kernel\nint f() { return 1; }  // one\n\n/* of\ntwo */ asm("// kept;");\n')
    before = file_digests(str(path))
    edit(path, "// a kernel", "// the kernel\n\n")
    edit(path, "  // one", "")
    edit(path, "of\ntwo", "it")
    assert file_digests(str(path)) == before
    edit(path, "// kept;", "// left;")
    assert file_digests(str(path)) != before
    edit(path, "// left;", "// kept;")
    edit(path, "return 1", "return 2")
    assert file_digests(str(path)) != before


def test_a_sentence_in_the_kernels_of_cuda_leaves_the_digest_as_it_is(kernels: Path) -> None:
    whole = source_digest([TritonRunner])
    edit(kernels / "device" / "fp8_cuda.cu", "// Decoding:", "// How they are decoded:")
    assert source_digest([TritonRunner]) == whole
    edit(kernels / "device" / "mma.cuh", "e4m3.e4m3", "e5m2.e4m3")
    assert source_digest([TritonRunner]) != whole

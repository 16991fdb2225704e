"""CUDA C++ is compiled for real where an NVRTC is found; where none is, what is said of the search."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from moestro.errors import BackendError
from moestro.kernels.triton import nvrtc

STORE = 'extern "C" __global__ void store(int* p) {{ *p = {0}; }}'


@pytest.fixture
def compiler() -> None:
    if reason := nvrtc.why_missing():
        pytest.skip(reason)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where it is looked for."""
    found: list[str] = []
    monkeypatch.setattr(nvrtc, "candidates", lambda: found)
    nvrtc._found.cache_clear()
    yield found
    nvrtc._found.cache_clear()


@pytest.mark.usefixtures("compiler")
def test_a_kernel_becomes_machine_code_for_hopper_and_the_log_counts_its_registers() -> None:
    image, log = nvrtc.compile(STORE.format(1), "store")
    assert image[:4] == b"\x7fELF"
    assert b"store" in image
    assert "'store' for 'sm_90a'" in log
    assert re.search(r"Used \d+ registers", log)
    assert " 0 bytes spill stores" in log


@pytest.mark.usefixtures("compiler")
def test_hoppers_own_instructions_are_known() -> None:
    source = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }'
    assert nvrtc.compile(source, "k").image


@pytest.mark.usefixtures("compiler")
def test_an_error_is_told_with_its_line() -> None:
    with pytest.raises(
        BackendError, match=r"(?s)kernel 'wrong' must be.*wrong\.cu\(1\): error: .*\"x\" is undefined"
    ):
        nvrtc.compile(STORE.format("x"), "wrong")


@pytest.mark.usefixtures("compiler")
def test_threads_compile_side_by_side_and_each_gets_its_own() -> None:
    sources = [STORE.format(number) for number in range(12)]
    alone = [nvrtc.compile(source, "store").image for source in sources]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda source: nvrtc.compile(source, "store").image, sources))
    assert together == alone
    assert len(set(alone)) == len(alone)


def test_where_there_is_none_the_error_says_where_it_was_looked_for(
    places: list[str], tmp_path: Path
) -> None:
    bad = tmp_path / "libnvrtc.so.13"
    bad.write_text("no library")
    places += ["libnvrtc.so.0", str(tmp_path / "nowhere" / "libnvrtc.so.13"), str(bad)]
    reason = nvrtc.why_missing()
    assert reason is not None
    assert "no NVRTC of CUDA 13 or 12 that compiles for sm_90a was found" in reason
    assert all(f"{place}: " in reason for place in places)
    assert "cannot open shared object file" in reason
    with pytest.raises(BackendError, match=r"kernel 'store' must be compiled by NVRTC: no NVRTC of CUDA"):
        nvrtc.compile(STORE.format(1), "store")


@pytest.mark.usefixtures("compiler")
def test_what_is_something_else_or_does_not_compile_is_passed_over(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = nvrtc._found().compiler
    assert good is None  # `places` is empty
    monkeypatch.undo()
    nvrtc._found.cache_clear()
    rest = nvrtc.candidates()
    monkeypatch.setattr(nvrtc, "candidates", lambda: ["libc.so.6", *rest])
    found = nvrtc._found()
    assert found.compiler is not None
    assert found.tried[0].startswith("libc.so.6: ")
    assert "nvrtcCreateProgram" in found.tried[0]
    assert nvrtc.why_missing() is None


def test_the_version_that_torch_has_comes_first_and_cuda_home_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/somewhere/cuda")
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "12.8")
    names = nvrtc.candidates()
    assert names[0] == "libnvrtc.so.12"
    assert "/somewhere/cuda/lib64/libnvrtc.so.13" in names
    assert [n for n in names if "/" not in n] == ["libnvrtc.so.12", "libnvrtc.so.13"]
    monkeypatch.setattr(nvrtc.torch.version, "cuda", None)
    assert nvrtc.candidates()[0] == "libnvrtc.so.13"


def test_a_status_is_an_error_that_names_the_function() -> None:
    class Function:
        def __init__(self, status: int) -> None:
            self.status = status

        def __call__(self, *arguments: Any) -> int:
            return self.status

    class Library:
        def __getattr__(self, name: str) -> Function:
            return Function(3 if name == "nvrtcGetCUBINSize" else 0)

    with pytest.raises(BackendError, match="nvrtcGetCUBINSize must return 0, got 3"):
        nvrtc.Compiler(Library()).compile("", "k")


def test_what_a_driver_cannot_load_is_not_compiled(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places += ["/nowhere/libnvrtc.so.13", "/nowhere/libnvrtc.so.12"]
    monkeypatch.setattr(nvrtc, "_driver_knows", lambda: 12)
    said = nvrtc.why_missing() or ""
    assert (
        "/nowhere/libnvrtc.so.13: the driver loads what CUDA 12 compiles, at most; /nowhere/libnvrtc.so.12: "
        in said
    )

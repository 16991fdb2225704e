"""What makes a tuning decision out of date: the sources of each backend."""

from __future__ import annotations

from moestro.kernels.cpu import CpuRunner
from moestro.kernels.portable import PortableRunner
from moestro.kernels.problem import MoeRunner


def sources(runner: type[MoeRunner]) -> set[str]:
    return {path.name for path in runner.kernel_sources(runner.__new__(runner))}


def test_a_backends_sources_are_all_of_its_own_files() -> None:
    assert {"portable.py", "portable_tactics.py"} <= sources(PortableRunner)
    assert "problem.py" not in sources(PortableRunner)
    assert {"runner.py", "moe.cpp", "kernels.h"} <= sources(CpuRunner)

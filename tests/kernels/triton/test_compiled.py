"""The kernels compile without a GPU: for sm_90 every family of tactics, for sm_100 to FP4 tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.8")


@pytest.mark.parametrize(
    ("program", "target"),
    [
        ("compile_all", "sm_90"),
        ("compile_all", "gluon_sm_90"),
        ("compile_all", "dense_sm_90"),
        ("compile_all", "sm_100"),
        ("compile_fp8", "sm_90"),
    ],
)
def test_compiles_to_what_it_must(program: str, target: str) -> None:
    path = Path(__file__).with_name(f"{program}.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(path), target], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

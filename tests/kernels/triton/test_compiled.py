"""The kernels compile without a GPU: for sm_90 every family of tactics, for sm_100 to FP4 tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.8")


@pytest.mark.parametrize("target", ["sm_90", "gluon_sm_90", "sm_100"])
def test_compiles_to_what_it_must(target: str) -> None:
    program = Path(__file__).with_name("compile_all.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(program), target], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

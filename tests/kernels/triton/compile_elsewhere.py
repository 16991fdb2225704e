"""Compile a layer's kernels for sm_90 in other processes, without a GPU: `python compile_elsewhere.py FOLDER`.

FOLDER is Triton's cache. Prints what happened; exit status 0 if this process found all of it there. A program of its own,
because the test process interprets the kernels.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_CACHE_DIR": sys.argv[1], "MOESTRO_COMPILE_PROCESSES": "2"}

import torch
import triton
from offline import inputs_of, runner_of
from triton.backends.compiler import GPUTarget

from moestro.kernels.triton import elsewhere
from moestro.kernels.triton.paths import fp8_once

HOPPER = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(elsewhere._Absent(HOPPER))


def files() -> set[Path]:
    return {path for path in Path(sys.argv[1]).rglob("*") if path.is_file()}


def not_aligned(value: Any) -> Any:
    """A tensor as it would be one element further on."""
    return value.new_empty(9)[1:] if isinstance(value, torch.Tensor) else value


def main() -> list[str]:
    runner = runner_of(8, 2, 512, 256, "fp8_block", input_format="fp8")
    launches = {
        launch.key: launch for launch in runner.plan(inputs_of(runner, 300), fp8_once.TABLE["fp8"][0])
    }
    shifted = [replace(one, args=tuple(map(not_aligned, one.args))) for one in launches.values()]
    bad = [
        f"{one.kernel.__name__} travels as another"
        for one in (*launches.values(), *shifted)
        if elsewhere.loads(elsewhere.dumps(one)).key != one.key
    ]
    farm = elsewhere._farm_of(2, HOPPER)
    began = time.perf_counter()
    with ThreadPoolExecutor(len(launches)) as pool:
        there = list(pool.map(farm.compile, launches.values()))
    between, made = time.perf_counter(), files()
    for launch in launches.values():
        elsewhere.compiled(launch)
    after = time.perf_counter()
    print(f"{len(launches)} kernels, {between - began:.1f} s in 2 processes, {after - between:.1f} s here")
    bad += [] if all(there) else [f"not compiled elsewhere: {there}"]
    bad += [f"compiled again: {path}" for path in files() - made]
    bad += ["the processes were given up"] if farm.useless else []
    bad += [] if made else ["nothing is in the cache"]
    process = farm._idle.get_nowait()
    process._child.kill()
    farm._idle.put(process)
    one, *_ = launches.values()
    bad += ["a process that was killed has compiled"] if farm.compile(one) else []
    bad += [] if farm.compile(one) else ["no process took the place of the one that was killed"]
    farm.close()
    return bad


if __name__ == "__main__":
    found = main()
    print(*found, sep="\n")
    sys.exit(bool(found))

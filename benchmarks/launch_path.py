"""Host time of a warm call of the Triton backend, launched as ever and replayed, in front of a stubbed driver.

No GPU: a libcuda whose functions return success at once stands in, tensors on the CPU pose as device pointers, and
kernels are compiled for sm_90 but never run. So this is Python, Triton's own launcher in C, and nothing of the driver
(cuLaunchKernelEx itself takes 1.5 to 2.5 µs a launch on a GPU machine, which come on top of both columns).

    PYTHONPATH=/tmp/t36:src python benchmarks/launch_path.py [--json FILE]     # /tmp/t36 holds triton 3.6.0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

STUB = """
#include <stdint.h>
#include <stddef.h>
typedef uint64_t u64;
int cuInit(unsigned f) { return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuCtxGetLimit(size_t* v, int l) { *v = 0; return 0; }
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
int cuModuleLoadData(void** m, const void* image) { *m = (void*)1; return 0; }
int cuModuleGetFunction(void** f, void* m, const char* name) { *f = (void*)1; return 0; }
int cuFuncGetAttribute(int* v, int a, void* f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void* f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void* f, int c) { return 0; }
int cuGetErrorString(int e, const char** s) { *s = "stub"; return 0; }
int cuPointerGetAttribute(void* data, int a, u64 p) { *(u64*)data = p; return 0; }
int cuLaunchKernelEx(void* config, void* f, void** params, void** extra) { return 0; }
int cuLaunchKernel() { return 0; }
int cuOccupancyMaxActiveClusters(int* n, void* f, void* c) { *n = 1; return 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuMemcpyDtoHAsync_v2() { return 0; }
int cuStreamSynchronize() { return 0; }
"""
SIZES = (1, 16, 64, 256)
ROUNDS, CALLS = 30, 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "TRITON_LIBCUDA_PATH" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | stub_library())
    rows = [measured(fmt, n) for fmt in ("nvfp4", "bf16") for n in SIZES]
    import torch
    import triton

    for row in rows:
        print("{weights} N={tokens}: {launches} launches, plain {plain_us:.1f} µs, replayed {replayed_us:.1f} µs, "
              "layer replayed {layer_us:.1f} µs".format(**row))  # fmt: skip
    if options.json:
        facts = {
            "what": "host time of a warm call, stubbed driver: no GPU",
            "command": "PYTHONPATH=/tmp/t36:src python benchmarks/launch_path.py",
            "torch": torch.__version__, "triton": triton.__version__, "date": str(date.today()), "machine": cpu(),
        }  # fmt: skip
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def stub_library() -> dict[str, str]:
    """Compile the stub; the environment in which Triton links against it."""
    folder = Path(tempfile.mkdtemp(prefix="moestro-stub-"))
    (folder / "stub.c").write_text(STUB)
    target = folder / "libcuda.so.1"
    subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", target, folder / "stub.c"], check=True)
    (folder / "libcuda.so").symlink_to(target)
    found = os.environ.get("LD_LIBRARY_PATH")
    return {
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": f"{folder}:{found}" if found else str(folder),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder / "cache")),
    }


def measured(weights: str, tokens: int) -> dict[str, Any]:
    """µs of a call: medians of rounds, the two ways in turns."""
    stubbed_driver()
    import torch

    from moestro import ExpertWeights, FusedMoE
    from moestro.kernels.triton import TritonRunner, replay

    TritonRunner.why_not = classmethod(lambda cls, problem: None)  # type: ignore[method-assign, assignment]
    version = ".".join(replay.triton.__version__.split(".")[:2])
    assert version in replay.KNOWN, version
    experts, top_k, hidden, inter = 32, 8, 2048, 768
    dense = [
        torch.zeros(experts, r, c, dtype=torch.bfloat16) for r, c in ((2 * inter, hidden), (hidden, inter))
    ]
    layer = FusedMoE(
        ExpertWeights.from_dense(*dense, weights), top_k, max_num_tokens=tokens, backend="triton"
    )
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    inputs = [x, ids, torch.zeros(tokens, top_k), torch.empty_like(x)]
    layer(*inputs[:3])
    [runner] = layer.runners
    workspace = torch.empty(runner.workspace_bytes(tokens, -1), dtype=torch.uint8)
    bound = runner.bind(inputs, -1)
    bound(inputs, workspace)
    ways = {
        "plain_us": lambda: runner.forward(inputs, -1, workspace=workspace),
        "replayed_us": lambda: bound(inputs, workspace),
        "layer_us": lambda: layer(*inputs[:3]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    launches = len(runner.plan(inputs, -1, workspace))
    found = {name: round(median(values), 1) for name, values in times.items()}
    return {"weights": weights, "tokens": tokens, "launches": launches, **found}


def stubbed_driver() -> None:
    """Triton's own driver and launcher on the stub library, for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Stubbed(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    if not isinstance(triton.runtime.driver._active, CudaDriver):
        triton.runtime.driver.set_active(Stubbed())


def cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()

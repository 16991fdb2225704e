"""Kernels of FP8 layers under Nsight Compute: what limits them, for docs/lab/hopper.md.

    PYTHONPATH=src ncu --profile-from-start off --clock-control none $(python benchmarks/gpu_profile.py --sections) \\
        --kernel-name regex:'gemm|cuda' python benchmarks/gpu_profile.py

A layer runs twice with each tactic; the second run is profiled. Where ncu cannot read the counters it says so and fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "InstructionStats",
    "LaunchStats",
)


def cases() -> Iterator[tuple[str, str, str | None, int, object]]:
    """(model, format, input format, tokens, tactic)."""
    from moestro.kernels.triton.choose import FP8_BLOCKS
    from moestro.kernels.triton.paths import fp8_cuda, fp8_once

    yield "deepseek", "nvfp4", "fp8", 4096, fp8_cuda.tactic(160, 128)
    yield "deepseek", "nvfp4", "fp8", 4096, fp8_once.LARGE
    yield "deepseek", "nvfp4", "fp8", 1024, fp8_cuda.tactic(144, 128)
    yield "deepseek", "nvfp4", "fp8", 256, fp8_cuda.tactic(80, 256)
    yield "deepseek", "fp8_block", "fp8", 4096, FP8_BLOCKS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", action="store_true", help="print ncu's options")
    if parser.parse_args().sections:
        print(" ".join(f"--section {name}" for name in SECTIONS))
        return 0
    import torch
    from gpu_fp8 import MODELS, inputs_of, make

    from moestro.kernels.activations import SwiGLU

    runners = {}
    for model, fmt, input_format, tokens, tactic in cases():
        key = (model, fmt, input_format)
        if key not in runners:
            L, K, H, I = MODELS[model]  # noqa: E741
            runners[key] = make(fmt, L, K, H, I, SwiGLU(), False, L, 0, input_format)[0]
        inputs = inputs_of(runners[key].problem, tokens)
        runners[key].forward(inputs, tactic)
        torch.cuda.synchronize()
        print(f"--- {model} {fmt} {input_format} N={tokens} {tactic}", flush=True)
        torch.cuda.profiler.start()
        runners[key].forward(inputs, tactic)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

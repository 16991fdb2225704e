"""Compile the FP8 products in Triton for sm_90 without a GPU: `python compile_fp8.py`.

Exit status 0 if all is well. A program of its own, because the test process interprets the kernels.
"""

from __future__ import annotations

import re
import sys

from offline import compile_launch, inputs_of, runner_of

from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.triton import Tactic, TritonRunner, choose
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.paths import fp8, fp8_once

TOKENS = 1100
PRODUCT = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"


def complaints(launch: Launch) -> list[str]:
    name = f"{launch.kernel.__name__} {launch.meta}"
    compiled = compile_launch(launch)
    ptx, bad = compiled.asm["ptx"], []
    if "gemm" in launch.kernel.__name__:
        if PRODUCT not in ptx:
            bad.append(f"{name}: no FP8 product")
        # each block of 128 columns is four products into sums of its own, and waited for before it is added
        waits = set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx))
        if waits != {"0"}:
            bad.append(f"{name}: a block's product is added while it runs ({waits})")
        if "cp.async.bulk.tensor" not in ptx or "setmaxnreg" not in ptx:
            bad.append(f"{name}: no tensor memory accelerator, or no registers moved to those who multiply")
    if "fp4" in launch.kernel.__name__ or "expand" in launch.kernel.__name__:
        bad += [] if "prmt.b32" in ptx else [f"{name}: no byte permutes"]
    return bad


def cases() -> list[tuple[TritonRunner, Tactic]]:
    """(runner, tactic) of all kernels."""
    odd = {"activation": GeGLUTanh(), "biases": True}
    return [
        *((runner_of(8, 2, 512, 256, "nvfp4", input_format="fp8"), t) for t in fp8.TABLE["fp8"]),
        (runner_of(4, 2, 144, 80, "nvfp4", input_format="fp8", **odd), fp8.TABLE["fp8"][1]),
        (runner_of(4, 2, 160, 96, "mxfp4", ReLU2(), True, "fp8"), fp8.TABLE["fp8"][0]),
        (runner_of(8, 2, 512, 256, "mxfp4", SwiGLU(1.702, 7.0, 1.0), True, "fp8"), fp8_once.LARGE),
        (runner_of(8, 2, 512, 256, "mxfp4", input_format="fp8", ranks=2), fp8_once.LARGE),
        *((runner_of(8, 2, 512, 256, "fp8_block", input_format="fp8"), t) for t in fp8_once.TABLE["fp8"]),
        (runner_of(4, 2, 144, 80, "fp8_block", ReLU2(), True, "fp8"), fp8_once.LARGE),
    ]


def main() -> list[str]:
    bad, seen = [], set()
    for runner, tactic in cases():
        assert choose.why_not(runner.problem, tactic, TOKENS) is None, (runner.problem, tactic)
        for launch in runner.plan(inputs_of(runner, TOKENS), tactic):
            key = launch.key
            if key not in seen and launch.kernel.__name__ not in ("count", "place", "sum_pairs"):
                seen.add(key)
                bad += complaints(launch)
    print(len(seen), "kernels")
    return bad


if __name__ == "__main__":
    found = main()
    print("\n".join(found))
    sys.exit(bool(found))

"""Compile kernels without a GPU: `python compile_all.py sm_90` or `sm_100`; exit status 0 if all is well.

A program of its own, because the test process interprets the kernels.
"""

from __future__ import annotations

import re
import sys

import torch
from offline import compile_launch, inputs_of, runner_of

from moestro.kernels.activations import ReLU2
from moestro.kernels.triton import tactics
from moestro.kernels.triton.plan import Launch

WGMMA, MMA = "wgmma.mma_async", "mma.sync"


def sm_90() -> list[str]:
    """Every family of tactics: products must be on the tensor cores, and wait as they must."""
    bad = []
    nvfp4, bf16 = runner_of(8, 2, 512, 256, "nvfp4"), runner_of(8, 2, 512, 256, "bf16")
    large, dense = tactics.NVFP4_DEFAULTS[-2][1], tactics.NVFP4_DEFAULTS[-1][1]
    plain = tactics.DENSE_DEFAULTS[0][1]  # 16 pairs wide
    cases = [
        (nvfp4, 1, -1),  # one pair a program
        (nvfp4, 3, -1),  # programs find their pairs
        (nvfp4, 12, -1),  # sorted, narrow
        (nvfp4, 700, plain),
        (nvfp4, 700, large),  # two widths, narrowing; wgmma with A in registers
        (nvfp4, 700, dense),
        (runner_of(4, 2, 144, 80, "nvfp4", ReLU2(), biases=True), 700, plain),
        (bf16, 700, plain),
        (bf16, 700, dense),
        (runner_of(4, 2, 144, 80, "nvfp4", input_format="nvfp4"), 9, plain),
    ]
    seen = set()
    for runner, n, wanted in cases:
        tactic = wanted if wanted == -1 else tactics.fitted(runner.problem, wanted)
        for launch in runner.plan(inputs_of(runner, n), tactic):
            key = (launch.kernel.__name__, repr(sorted((k, str(v)) for k, v in launch.meta.items())))
            if key not in seen:
                seen.add(key)
                bad += complaints(launch)
    print(len(seen), "kernels")
    return bad


def complaints(launch: Launch) -> list[str]:
    name = f"{launch.kernel.__name__} {launch.meta}"
    ptx = compile_launch(launch).asm["ptx"]
    bad = []
    if "gemm" in launch.kernel.__name__ and WGMMA not in ptx and MMA not in ptx:
        bad.append(f"{name}: no tensor core instruction")
    if launch.kernel.__name__ == "dense_gemm" and "cp.async.bulk.tensor" not in ptx:
        bad.append(f"{name}: no tensor memory accelerator")
    if launch.meta.get("FORMAT") == 1:
        # A registers must not be decoded anew while a wgmma reads them: no wait may leave one running
        running = set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) - {"0"}
        if running:
            bad.append(f"{name}: a wgmma with A in registers runs on ({running})")
    return bad


def sm_100() -> list[str]:
    """FP4 tensor cores with e4m3 scales per 16, from tl.dot_scaled."""
    from moestro.kernels.triton.blackwell import scaled_gemm

    u8, fp8, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    tensors = [torch.empty(16, dtype=t) for t in (u8, fp8, u8, fp8, f32, f32, torch.int32, torch.bfloat16)]
    meta = {"BT": 128, "BR": 128, "BK": 256, "STAGES": 3, "num_warps": 4}
    launch = Launch(scaled_gemm, (1,), (*tensors, 4096, 7168, 32), meta)
    ptx = compile_launch(launch, 100).asm["ptx"]
    kinds = set(re.findall(r"tcgen05\.mma\S*", ptx))
    print(kinds)
    ok = any("mxf4nvf4" in kind and ("block16" in kind or "4X" in kind) for kind in kinds)
    return [] if ok else [f"no tcgen05.mma of kind mxf4nvf4 in {kinds}"]


if __name__ == "__main__":
    problems = {"sm_90": sm_90, "sm_100": sm_100}[sys.argv[1]]()
    print("\n".join(problems))
    sys.exit(len(problems) > 0)

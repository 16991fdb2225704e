"""Compile the FP8 products for sm_90 without a GPU: `python compile_fp8.py [shared|in_order|gathered]`.

shared: operands in shared memory; the others: weights in registers, with rows of x in order or, in wide tiles, gathered. All
of them without a word. Exit status 0 if all is well. A program of its own, because the test process interprets the kernels.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from inflight import Instruction, disassemble, overwritten
from offline import compile_launch, inputs_of, runner_of

from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.triton import Tactic, TritonRunner, choose
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.paths import fp8, fp8_once, fp8_registers

# Wide tiles that may gather. In wider ones ptxas of Triton 3.8 and 3.9 lets the producer spill addresses then; that of 3.6,
# with which they were measured, does not.
GATHERED = [t for t in fp8_registers.TABLE["fp8"] if fp8_registers.WIDE <= t.pairs1 <= 128]
TOKENS = 1100
PARTS = ("shared", "in_order", "gathered")
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
    if "registers" in launch.kernel.__name__:
        with TemporaryDirectory() as folder:
            code = disassemble(compiled.asm["cubin"], Path(folder) / "kernel.cubin")
        bad += in_registers(name, code) + long_copies(name, code)
    if "fp4" in launch.kernel.__name__ or "expand" in launch.kernel.__name__:
        bad += [] if "prmt.b32" in ptx else [f"{name}: no byte permutes"]
    return bad


def long_copies(name: str, code: dict[int, Instruction]) -> list[str]:
    """What is wrong with a producer's loops, whose instructions cost the tensor core a cycle each."""
    ends = {at: i.goes_to for at, i in code.items() if i.goes_to is not None and i.goes_to < at}
    loops = [[code[at].text for at in code if start <= at <= end] for end, start in ends.items()
             if not any(start < other < end for other in ends)]  # fmt: skip
    loops = [loop for loop in loops if any("UTMALDG" in text for text in loop)]
    bad = [] if loops else [f"{name}: the tensor memory accelerator copies nothing"]
    for loop in loops:
        gathered, boxes = (sum(word in text for text in loop) for word in ("LDGSTS", "UTMALDG"))
        most = 80 + 3 * gathered if gathered else 45 + 7 * boxes
        if len(loop) > most:
            bad.append(f"{name}: {len(loop)} instructions to fill a stage, not {most} at most")
        if any(re.match(r"(STL|LDL)", text) for text in loop):
            bad.append(f"{name}: the producer keeps addresses in local memory")
    return bad


def in_registers(name: str, code: dict[int, Instruction]) -> list[str]:
    """Of the path that decodes in registers: how its operands get there, and that nothing writes them meanwhile."""
    products = [at for at, i in code.items() if i.a]
    bad = [f"{name}: {what}" for what in overwritten(code)[:1]]
    if not products:
        bad.append(f"{name}: no product with weights in registers")
    waits = sum("DEPBAR" in i.text for i in code.values())
    if waits > len(products) // 2:  # ptxas waits after each one where it sees a conflict (C7510 to C7514)
        bad.append(f"{name}: {len(products)} products are waited for {waits} times")
    for at in products:  # what stands between the products of a block may not go through shared memory
        following = [i.text for where, i in code.items() if at < where <= at + 16 * 200]
        until = next((n for n, text in enumerate(following) if "DEPBAR" in text), 0)
        if any(re.match(r"(STS|STL|LDL|SHFL)", text) for text in following[:until]):
            bad.append(f"{name}: a product waits for shared or local memory")
            break
    return bad


def cases(part: str) -> list[tuple[TritonRunner, Tactic]]:
    """(runner, tactic) of a part of the kernels."""
    odd = {"activation": GeGLUTanh(), "biases": True}
    if part == "gathered":  # at so many tokens the wide tiles gather rows of x
        return [(runner_of(8, 2, 32768, 256, "nvfp4", input_format="fp8"), t) for t in GATHERED]
    if part == "in_order":
        return [
            *(
                (runner_of(8, 2, 512, 256, "nvfp4", input_format="fp8"), t)
                for t in fp8_registers.TABLE["fp8"]
            ),
            (runner_of(4, 2, 160, 96, "mxfp4", ReLU2(), True, "fp8"), fp8_registers.TABLE["fp8"][0]),
            (runner_of(4, 2, 144, 80, "nvfp4", input_format="fp8", **odd), fp8_registers.TABLE["fp8"][-1]),
        ]
    return [
        *((runner_of(8, 2, 512, 256, "nvfp4", input_format="fp8"), t) for t in fp8.TABLE["fp8"]),
        (runner_of(4, 2, 144, 80, "nvfp4", input_format="fp8", **odd), fp8.TABLE["fp8"][1]),
        (runner_of(4, 2, 160, 96, "mxfp4", ReLU2(), True, "fp8"), fp8.TABLE["fp8"][0]),
        (runner_of(8, 2, 512, 256, "mxfp4", SwiGLU(1.702, 7.0, 1.0), True, "fp8"), fp8_once.LARGE),
        *((runner_of(8, 2, 512, 256, "fp8_block", input_format="fp8"), t) for t in fp8_once.TABLE["fp8"]),
        (runner_of(4, 2, 144, 80, "fp8_block", ReLU2(), True, "fp8"), fp8_once.LARGE),
    ]


def main(parts: list[str]) -> list[str]:
    bad, seen = [], set()
    for runner, tactic in [case for part in parts for case in cases(part)]:
        assert choose.why_not(runner.problem, tactic, TOKENS) is None, (runner.problem, tactic)
        for launch in runner.plan(inputs_of(runner, TOKENS), tactic):
            key = launch.key
            if key not in seen and launch.kernel.__name__ not in ("count", "place", "sum_pairs"):
                seen.add(key)
                bad += complaints(launch)
    print(len(seen), "kernels")
    return bad


if __name__ == "__main__":
    found = main([part for part in PARTS if part in sys.argv[1]] if sys.argv[1:] else list(PARTS))
    print("\n".join(found))
    sys.exit(bool(found))

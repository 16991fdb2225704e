"""Compile kernels without a GPU: `python compile_all.py sm_90` (sm_100, gluon_sm_90, dense_sm_90); exit status 0: all well.

A program of its own, because the test process interprets the kernels.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import inflight
import triton
import wide_tiles
from offline import compile_launch, inputs_of, runner_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moestro.kernels.activations import ReLU2
from moestro.kernels.triton import Tactic, TritonRunner, chip, choose
from moestro.kernels.triton.call import Launch
from moestro.kernels.triton.device import fp4 as blackwell
from moestro.kernels.triton.device import fp8_mx as block_scaled
from moestro.kernels.triton.device import loops
from moestro.kernels.triton.device.decode import BF16
from moestro.kernels.triton.paths import chain, dense, fp4, fp8_mx, fused, warp_specialized
from moestro.kernels.triton.tactic import SHARED_BYTES, Tile

TENSOR_COLUMNS = 512  # of a processor's tensor memory on sm_100
WGMMA, MMA = "wgmma.mma_async", "mma.sync"
# of block-scaled products: scales of 16 and of 32 columns, as Triton 3.9 or 3.6 spells them
SCALED = {
    blackwell.scaled_gemm: r"tcgen05\.mma\S*mxf4nvf4\S*(block16|4X)",
    block_scaled.mx_gemm: r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale\.(block32|scale_vec::1X)",
}
DENSE = "dense_wide_gemm"


def sm_90() -> list[str]:
    """Every family of tactics: products must be on the tensor cores, and wait as they must."""
    bad = []
    nvfp4, bf16 = runner_of(8, 2, 512, 256, "nvfp4"), runner_of(8, 2, 512, 256, "bf16")
    large, dequantized = (tactic for _, tactic in choose.WITHOUT_WGMMA)
    plain = choose.DENSE_DEFAULTS[0][1]  # 16 pairs wide
    small, medium = Tile(64, 2, 4, 4), Tile(128, 2, 4, 3)
    cases = [
        (nvfp4, 1, -1),  # one pair a program
        (nvfp4, 3, -1),  # programs find their pairs
        (nvfp4, 12, -1),  # sorted, narrow
        (nvfp4, 1, chain.tactic(8, Tile(32, 4, 2, 4), "direct")),  # both products in one launch
        (nvfp4, 3, chain.tactic(8, small, "direct", prefetch_kib=16)),
        (nvfp4, 60, chain.tactic(32, medium, split_k=2)),
        (nvfp4, 700, plain),
        (nvfp4, 700, large),  # two widths, narrowing; wgmma with A in registers
        (nvfp4, 700, dequantized),
        (runner_of(4, 2, 144, 80, "nvfp4", ReLU2(), biases=True), 700, plain),
        (bf16, 700, plain),
        (bf16, 700, dequantized),
        (bf16, 700, fused.tactic(32, medium, medium)),
        (
            runner_of(4, 2, 576, 192, "bf16"),
            700,
            chain.tactic(8, Tile(128, 2, 4, 5)),
        ),  # steps of three blocks
        (runner_of(4, 2, 144, 80, "nvfp4", input_format="nvfp4"), 9, plain),
        (
            runner_of(4, 2, 144, 80, "nvfp4", input_format="nvfp4", ranks=2),
            9,
            plain,
        ),  # rows that are left out
        (runner_of(8, 2, 512, 320, "bf16", input_format="fp8", ranks=2), 700, dequantized),
    ]
    for fmt in ("mxfp4", "fp8_block", "int4"):
        runner = runner_of(8, 2, 512, 320, fmt, biases=True)
        cases += [
            (runner, 3, chain.tactic(8, small, "direct", prefetch_kib=16)),
            (runner, 700, large),
            (runner, 700, dequantized),
        ]
    rounded = (("int4", 60, -1), ("mxfp8", 700, large), ("bf16", 700, dequantized))  # rows, to e4m3
    for fmt, n, wanted in rounded:
        cases.append((runner_of(8, 2, 512, 320, fmt, biases=True, input_format="fp8"), n, wanted))
    seen = set()
    for runner, n, wanted in cases:
        default = choose.default(runner.problem, n)
        tactic = default if wanted == -1 else choose.fitted(runner.problem, wanted)
        for launch in runner.plan(inputs_of(runner, n), tactic):
            if launch.key not in seen:
                seen.add(launch.key)
                bad += complaints(launch, ring_of(launch, runner, tactic))
    print(len(seen), "kernels")
    return bad


def ring_of(launch: Launch, runner: TritonRunner, tactic: Tactic) -> int:
    """Bytes of shared memory that the path says a product's pipeline takes; 0 for what is no product of the fused path."""
    stages = {"moe_gemm": (getattr(launch.meta.get("HOW"), "stage", 0),), "moe_chain": (1, 2)}
    return max(
        (fused.shared_bytes(runner.problem, tactic, s) for s in stages.get(launch.kernel.__name__, ())),
        default=0,
    )


def complaints(launch: Launch, ring: int = 0) -> list[str]:
    """What is wrong with a kernel. ring: see `ring_of`."""
    name = f"{launch.kernel.__name__} {launch.meta}"
    kernel = compile_launch(launch)
    compiled = kernel.asm
    ptx, bad = compiled["ptx"], []
    if ring and kernel.metadata.shared > ring:
        bad.append(
            f"{name}: {kernel.metadata.shared} bytes of shared memory, not {ring}: it may not fit where it should"
        )
    if launch.kernel.__name__ == "wide_gemm":
        bad += machine_code(name, compiled["cubin"])
    if re.search("gemm|chain", launch.kernel.__name__) and WGMMA not in ptx and MMA not in ptx:
        bad.append(f"{name}: no tensor core instruction")
    says, looks = re.search(r"(atom|red)\S*\.gpu\S*\.release|\.release\.gpu", ptx), "ld.acquire.gpu" in ptx
    if launch.kernel.__name__ == "moe_chain" and not (says and looks):
        bad.append(f"{name}: a tile may read what another has not yet written")
    if launch.kernel.__name__ == "dense_gemm" and "cp.async.bulk.tensor" not in ptx:
        bad.append(f"{name}: no tensor memory accelerator")
    if decodes(launch) and launch.kernel.__name__ != "wide_gemm":
        # A registers must not be decoded anew while a wgmma reads them: no wait may leave one running
        running = set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) - {"0"}
        if running:
            bad.append(f"{name}: a wgmma with A in registers runs on ({running})")
    return bad


def decodes(launch: Launch) -> bool:
    """Whether a product decodes its weights in registers."""
    how = launch.meta.get("HOW")
    how = getattr(how, "first", how)
    return launch.kernel.__name__ in ("moe_gemm", "moe_chain", "wide_gemm") and how.format != BF16.value


def gluon_sm_90() -> list[str]:
    """Wide products: wgmmas run on while the next weights are decoded, but none sees its registers change."""
    odd = runner_of(4, 2, 320, 144, "nvfp4", ReLU2(), biases=True)
    even, rest = runner_of(8, 2, 512, 256, "nvfp4"), Tile(128, 1, 4, 4)
    one_consumer, table = warp_specialized.tactic(64, rest, ""), wide_tiles.TILES[:7]
    parts = next(t for t in warp_specialized.TABLE["packed"] if t.split_k > 1)
    others = [runner_of(8, 2, 512, 256, fmt, biases=True) for fmt in ("mxfp4", "fp8_block")]
    bad = []
    for runner, wanted in (
        *((even, tactic) for tactic in table),
        *zip(others, (table[1], table[-3]), strict=True),
        (odd, one_consumer),  # ragged columns
        (runner_of(2, 1, 64, 8192, "nvfp4", biases=True), parts),
    ):
        tactic = choose.fitted(runner.problem, wanted)
        assert choose.why_not(runner.problem, tactic, 700) is None
        bad += [c for launch in runner.plan(inputs_of(runner, 700), tactic)[1:-1] for c in complaints(launch)]
    with tempfile.TemporaryDirectory() as apart:  # the cache does not see that a function was replaced
        knobs = patch.multiple(triton.knobs.cache, dir=apart), patch.object(loops, "_retire_both", lax)
        with knobs[0], knobs[1]:
            launches = odd.plan(inputs_of(odd, 700), one_consumer)
            if not any(complaints(launch) for launch in launches):
                bad.append("a wait that leaves one more product running goes unnoticed")
    return bad


def dense_sm_90() -> list[str]:
    """Dense wide products: weights and rows by TMA, products that run on, and no register in local memory."""
    few, ragged = dense.FEW, dense.TABLE["dense"][-1]  # the narrowest, and the one of most pairs
    even, odd = runner_of(8, 2, 512, 256, "bf16"), runner_of(4, 2, 320, 144, "bf16", ReLU2(), biases=True)
    bad = []
    for runner, tactic in ((even, few), (even, dense.FULL), (even, ragged), (odd, ragged)):
        with patch.object(dense, "has_wgmma", return_value=True):
            assert choose.why_not(runner.problem, tactic, 700) is None, tactic
        launches = [a for a in runner.plan(inputs_of(runner, 700), tactic) if a.kernel.__name__ == DENSE]
        assert len(launches) == 2, tactic  # the two products
        bad += [c for launch in launches for c in stays_in_registers(launch)]
    return bad


def stays_in_registers(launch: Launch) -> list[str]:
    """Of a dense wide product."""
    name, compiled = f"{launch.kernel.__name__} {launch.meta}", compile_launch(launch).asm
    ptx = compiled["ptx"]
    bad = [f"{name}: no {a}" for a in (WGMMA, "cp.async.bulk.tensor", "setmaxnreg") if a not in ptx]
    if not set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) - {"0"}:
        bad.append(f"{name}: every wgmma is waited for")
    with tempfile.TemporaryDirectory() as folder:
        code = inflight.disassemble(compiled["cubin"], Path(folder) / "kernel.cubin")
    local = [i.text for i in code.values() if re.search(r"\b(LDL|STL)\b", i.text)]
    return [*bad, *(f"{name}: local memory, {text}" for text in local[:1])]


@gluon.jit
def lax(acc, acc2, accb, accb2, a, RUNNING: gl.constexpr, W2: gl.constexpr):  # type: ignore[no-untyped-def]
    """_retire_both, but it does not wait for what reads a, nor say that a is read."""
    acc, accb = gl.nvidia.hopper.warpgroup_mma_wait(RUNNING + 1, deps=[acc, accb])
    return acc, acc2, accb, accb2, a


def machine_code(name: str, cubin: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        code = inflight.disassemble(cubin, Path(folder) / "kernel.cubin")
    bad = [f"{name}: {what}" for what in inflight.overwritten(code)[:3]]
    return bad if inflight.runs_on(code) else [*bad, f"{name}: every wgmma is waited for"]


def sm_100() -> list[str]:
    """The families of sm_90 on the tensor cores of sm_100, and W4A4 and FP8 activations on those that take scales."""
    nvfp4, bf16 = runner_of(8, 2, 512, 256, "nvfp4"), runner_of(8, 2, 512, 256, "bf16")
    large, dequantized = (tactic for _, tactic in choose.WITHOUT_WGMMA)
    others = [runner_of(8, 2, 512, 256, fmt, biases=True) for fmt in ("mxfp4", "mxfp8", "fp8_block", "int4")]
    launches = [
        launch
        for runner, n, tactic in (
            (nvfp4, 1, -1),
            (nvfp4, 700, large),
            (nvfp4, 700, dequantized),
            (bf16, 12, -1),
            *((runner, 700, large) for runner in others),
        )
        for launch in runner.plan(inputs_of(runner, n), tactic)
        if "gemm" in launch.kernel.__name__
    ]
    bad = [problem for launch in launches if (problem := _without(launch, r"tcgen05\.mma|mma\.sync"))]
    with patch.object(chip, "capability", return_value=(10, 0)):
        odd = runner_of(4, 2, 144, 80, "nvfp4", ReLU2(), biases=True, input_format="nvfp4")
        even = runner_of(8, 2, 512, 256, "nvfp4", input_format="nvfp4")
        mxfp4, mxfp8 = (runner_of(8, 2, 512, 256, fmt, input_format="fp8") for fmt in ("mxfp4", "mxfp8"))
        odd_mxfp4 = runner_of(4, 2, 160, 96, "mxfp4", ReLU2(), biases=True, input_format="fp8")
        by_table = fp8_mx.TABLE["fp8"]
        native_launches = [
            launch
            for runner, found in (
                (even, fp4.TABLE["nvfp4"]),
                (odd, fp4.TABLE["nvfp4"][1:2]),
                (mxfp4, by_table),
                (mxfp8, (by_table[0], by_table[-1])),
                (odd_mxfp4, by_table[1:2]),
            )
            for tactic in found
            for launch in runner.plan(inputs_of(runner, 700), tactic)[1:]  # without the sort
        ]
        bad += [
            f"{tactic}: more shared memory than its path says"
            for tactic in by_table
            if shared_of_products(mxfp4, tactic) > fp8_mx.shared_bytes(mxfp4.problem, tactic, 1)
        ]
    for launch in native_launches:
        problem = _without(launch, SCALED.get(launch.kernel, ""))
        bad += [problem] if problem else []
        if launch.kernel is block_scaled.mx_gemm and launch.meta["TILE"].even:
            slow = re.search(r"ld\.global\S*\.b(8|16)\b", compile_launch(launch, 100).asm["ptx"])
            bad += [f"{launch.meta}: scales are not copied asynchronously"] if slow else []
    print(len(launches) + len(native_launches), "kernels")
    return bad


def shared_of_products(runner: TritonRunner, tactic: Tactic) -> int:
    """The most shared bytes of a tactic's block-scaled products."""
    launches = runner.plan(inputs_of(runner, 700), tactic)
    return max(compile_launch(a, 100).metadata.shared for a in launches if a.kernel in SCALED)


def _without(launch: Launch, instruction: str) -> str | None:
    """What is wrong if the kernel compiles without the instruction, or to more memory than the chip has."""
    compiled = compile_launch(launch, 100)
    shared, tensor = compiled.metadata.shared, compiled.metadata.tmem_size
    if shared > SHARED_BYTES or tensor > TENSOR_COLUMNS:
        return f"{launch.kernel.__name__} {launch.meta}: {shared=} bytes, {tensor=} columns"
    ptx = compiled.asm["ptx"]
    if re.search(instruction, ptx):
        return None
    kinds = set(re.findall(r"tcgen05\.mma\S*|mma\.sync\S*", ptx))
    return f"{launch.kernel.__name__} {launch.meta}: {instruction} is not in {kinds}"


if __name__ == "__main__":
    targets = {"sm_90": sm_90, "gluon_sm_90": gluon_sm_90, "dense_sm_90": dense_sm_90, "sm_100": sm_100}
    problems = targets[sys.argv[1]]()
    print("\n".join(problems))
    sys.exit(len(problems) > 0)

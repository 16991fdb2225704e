"""The calls of gpu_session.py and their steps, each call's in order of value.

What a step should take (about_s) is an estimate until a session has measured it: 15 s for a process that imports torch,
compiles and begins, 3 s of compilation a kernel on 16 cores, and the arithmetic of its rounds.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PYTHON = shlex.quote(sys.executable)
PYTEST = f"{PYTHON} -m pytest -q -p no:cacheprovider"
LIMIT_S = 585  # of a call; a lent machine ends a command after 600
MISSED = 3  # a step's exit status: it ran, and its target was missed
STORE = "/tmp/gpu-session-store"  # of decisions, for all steps on one machine


class Step(NamedTuple):
    """A process: its name, command ({out}: the folder), limit in seconds, what it should take, and its dry run."""

    name: str
    command: str
    limit_s: int
    about_s: int = 0
    dry: str = ""


def _served(what: str, limit_s: int, about_s: int, more: str = "") -> Step:
    command = f"{PYTHON} {HERE}/gpu_served.py {what} --json {{out}}/{what}.json"
    tiny = "--device cpu --tiny --tokens 1,16 --rounds 2 --batches 22 --oracle 0.05 --each 1"
    return Step(what, f"{command} --seconds {limit_s - 20} {more}", limit_s, about_s, f"{command} {tiny}")


def _record(name: str, seconds: int, about_s: int, only: str) -> Step:
    program = f"CUDA_HOME=${{CUDA_HOME:-/usr/local/cuda}} {PYTHON} {HERE}/gpu_record.py {{out}}"
    tiny = "--seconds 60 --each 1 --device cpu --backend portable --tiny --only"
    return Step(name, f"{program} --store {STORE} --seconds {seconds} --only {only}", seconds + 20, about_s,
                f"{program} {tiny} {only.split(',')[0]}")  # fmt: skip


def _sanitized(tool: str, limit_s: int, about_s: int) -> Step:
    quick = f"{PYTHON} {HERE}/gpu_formats.py quick {QUICK}"
    return Step(tool, f"compute-sanitizer --tool {tool} --error-exitcode 9 {quick}", limit_s, about_s,
                f"TRITON_INTERPRET=1 {PYTHON} {HERE}/gpu_formats.py quick bf16 --tokens 3")  # fmt: skip


QUICK = "fp8_block+fp8 nvfp4+fp8 mxfp4+fp8 bf16 int4"  # fp8_once_cuda, fp8_cuda, dense, zero points
# checked side by side: what takes the time is compiling, two kernels a second in one process
PAIRS = (
    "nvfp4+fp8 mxfp4+fp8 fp8_block+fp8 int4+fp8 mxfp8+fp8 bf16+fp8 nvfp4 mxfp4 mxfp8 fp8_block int4 bf16 "
    "nvfp4+nvfp4 mxfp4+nvfp4 mxfp8+nvfp4 fp8_block+nvfp4 int4+nvfp4 bf16+nvfp4"
)
# Side by side, too: in one process test_triton_cuda.py alone takes longer than a call.
TESTS = " ".join(
    [
        "test_bench_cuda.py",
        "test_cuda_kernel.py",
        "test_cuda_timer.py",
        "test_operator_cuda.py",
        *(
            f"test_triton_cuda.py::test_{one}"
            for one in (
                "a_row_has_the_same_bits_whatever_its_batch",
                "chained_products_repeat_bit_for_bit",
                "chains_of_two_streams_do_not_share_their_counters",
                "every_format_matches_the_reference",
                "several_numbers_of_tokens_are_captured_from_one_layer_and_replayed_in_turn",
                "wide_products_equal_the_reference_and_repeat",
            )
        ),
    ]
)
SKEWED = "deepseek-skewed,mixtral-skewed,qwen3-skewed"
RECORDED = (  # in order of value: what the time does not reach is said
    "deepseek-fp8,deepseek-block,qwen3-fp8,gpt-oss-20b,deepseek,qwen3,mixtral,gpt-oss-120b,qwen3-block,mixtral-block,"
    "mixtral-mxfp4,qwen3-bf16,mixtral-bf16,deepseek-bf16"
)
CALLS: dict[str, tuple[Step, ...]] = {
    "served": (
        _served("equal", 160, 95),
        _served("verify", 70, 35),
        _served("host", 50, 20),
        _served("cost", 120, 75, f"--store {STORE}"),
        _served("decode", 80, 45),
        _served("sustained", 240, 165, f"--store {STORE}"),
        Step("quick", f"{PYTHON} {HERE}/gpu_formats.py quick {QUICK}", 70, 35,
             f"TRITON_INTERPRET=1 {PYTHON} {HERE}/gpu_formats.py quick int4 --tokens 3"),
    ),
    "record": (
        _record("skewed", 230, 200, SKEWED),
        Step("skew", f"{PYTHON} {HERE}/gpu_served.py skew {{out}}/record.json --json {{out}}/skew.json", 40, 15,
             f"{PYTHON} {HERE}/gpu_served.py skew {{out}}/record.json --json {{out}}/skew.json --device cpu"),
        _record("models", 300, 320, RECORDED),
    ),
    "check": (
        Step("fp8", f"{PYTHON} {HERE}/gpu_fp8.py check", 150, 110),
        Step("formats", f"printf '%s\\n' {PAIRS} | xargs -P 8 -n 1 {PYTHON} {HERE}/gpu_formats.py check --seconds 200",
             230, 150, f"{PYTHON} {HERE}/gpu_formats.py --help"),
        Step("vllm-method", f"{PYTEST} "
             f"{HERE.parent}/tests/integrations/vllm_plugin/test_method_cuda.py", 70, 40),
        Step("replay", f"{PYTHON} {HERE}/gpu_session.py replay", 110, 80),
    ),
    "sanitizers": (_sanitized("memcheck", 280, 160), _sanitized("racecheck", 120, 60)),
    "tests": (
        Step("tests", f"printf '%s\\n' {TESTS} | xargs -P 8 -I @ {PYTEST} "
             f"{HERE.parent}/tests/gpu/@", 580, 500, f"{PYTHON} -m pytest --version"),
    ),
    "streams": (
        Step("two-streams", f"{PYTHON} {HERE}/gpu_session.py two-streams", 120, 80),
        Step("graphs", f"{PYTHON} {HERE}/gpu_session.py graphs", 80, 50),
        Step("memcheck", f"compute-sanitizer --tool memcheck --error-exitcode 9 {PYTHON} {HERE}/gpu_formats.py quick",
             180, 90),
        Step("memcheck-replay", f"compute-sanitizer --tool memcheck --error-exitcode 9 {PYTHON} {HERE}/gpu_session.py "
             "replay --formats int4,nvfp4 --tokens 3,64", 170, 90),
    ),
    "times": (
        Step("eager", f"{PYTHON} {HERE}/gpu_session.py eager", 90, 20),
        Step("layers", f"{PYTHON} {HERE}/gpu_formats.py layers --json {{out}}/layers.json", 230, 150),
        Step("peers", f"{PYTHON} {HERE}/several.py 'bench --model deepseek-v3 --ep 8 --local-pairs "
             "--format nvfp4 --device cuda --tokens 1,16,256,4096 --json {out}/peers.json'", 230, 120),
    ),
}  # fmt: skip

"""Replayed calls against ordinary ones, argument by argument, in front of a stubbed driver: `python replay_all.py`.

A program of its own, because the test process interprets the kernels. Exit status 0 if all is well.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from offline import runner_of
from stub_driver import StubDriver, stubbed

import moestro
from moestro.kernels.activations import ReLU2, SwiGLU
from moestro.kernels.triton import TritonRunner, choose, nvrtc, replay

SIZES = (1, 2, 8, 17, 60, 255, 700)
SPARE = 64  # elements


def runners() -> dict[str, TritonRunner]:
    clamped = SwiGLU(1.702, 7.0, 1.0)
    made = {
        "nvfp4": runner_of(8, 2, 512, 256, "nvfp4"),
        "nvfp4 odd": runner_of(4, 2, 144, 80, "nvfp4", ReLU2(), biases=True),
        "mxfp4": runner_of(8, 2, 512, 320, "mxfp4", clamped, biases=True),
        "fp8_block": runner_of(8, 2, 512, 320, "fp8_block"),
        "int4": runner_of(8, 2, 512, 320, "int4"),
        "bf16": runner_of(8, 2, 512, 256, "bf16", biases=True),
        "nvfp4, W4A4": runner_of(4, 2, 144, 80, "nvfp4", input_format="nvfp4"),
        "nvfp4, FP8": runner_of(8, 2, 512, 256, "nvfp4", input_format="fp8"),
        "fp8_block, FP8": runner_of(8, 2, 512, 256, "fp8_block", input_format="fp8"),
    }
    half = made["nvfp4"]
    made["nvfp4, fp16"] = TritonRunner(replace(half.problem, dtype=torch.float16), half._experts)
    return made


def aligned(numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Memory whose address is `offset` elements beyond a multiple of 256 bytes."""
    size = dtype.itemsize
    raw = torch.zeros((numel + SPARE) * size + 512, dtype=torch.uint8)
    start = -raw.data_ptr() % 256 + offset * size
    return raw[start : start + numel * size].view(dtype)


def inputs_at(runner: TritonRunner, n: int, offsets: tuple[int, ...] = (0, 0, 0, 0)) -> list[torch.Tensor]:
    p, dtypes = runner.problem, (runner.problem.dtype, torch.int32, torch.float32, runner.problem.dtype)
    widths = (p.hidden_size, p.top_k, p.top_k, p.hidden_size)
    facts = zip(widths, dtypes, offsets, strict=True)
    return [aligned(n * width, dtype, offset).view(n, width) for width, dtype, offset in facts]


def call(driver: StubDriver, run: Any) -> list[tuple[Any, ...]]:
    driver.launched.clear()
    run()
    return list(driver.launched)


def plan_addresses(
    driver: StubDriver, runner: TritonRunner, n: int, tactic: Any, bound: Any, rng: Any
) -> list[str]:
    """One call of a bound plan, against the ordinary one."""
    nbytes = runner.workspace_bytes(n, tactic)
    misaligned = rng.random() < 0.3
    offsets = tuple(rng.choice([0, 8, 1, 3]) for _ in range(4)) if misaligned else (0, 0, 0, 0)
    inputs = inputs_at(runner, n, offsets)
    workspace = aligned(nbytes + rng.choice([0, 4096]), torch.uint8)
    driver.stream = rng.choice([0, 0, 77, 1234567])
    # the ordinary path looks the counters up for the current stream; the stubbed one is not torch's
    with patch.object(runner._counters, "here", lambda: runner._counters.of(driver.stream)):
        want = call(driver, lambda: runner.forward(inputs, tactic, workspace=workspace))
        got = call(driver, lambda: bound(inputs, workspace))
    if want != got:
        first = next((w[0], g[0]) for w, g in zip(want, got, strict=False) if w != g)
        return [
            f"N={n} {tactic} {offsets=} stream={driver.stream}: {first} differ, of {len(want)} and {len(got)}"
        ]
    return []


def every_path(driver: StubDriver) -> list[str]:
    bad, rng, replayed, cases, paths = [], random.Random(0), 0, 0, set()
    for name, runner in runners().items():
        for n in SIZES:
            tactics = [-1, *choose.worth_measuring(runner.problem, n)]
            for tactic in rng.sample(tactics, min(len(tactics), 4)):
                calls = []
                whole = replay.Replay.run

                def counted(self: Any, *args: Any, whole: Any = whole, calls: Any = calls) -> None:
                    calls.append(1)
                    whole(self, *args)

                bound = runner.bind(inputs_at(runner, n), tactic)
                with patch.object(replay.Replay, "run", counted):
                    for _ in range(4):
                        bad += [f"{name}: {b}" for b in plan_addresses(driver, runner, n, tactic, bound, rng)]
                cases += 1
                replayed += bool(calls)
                paths.add(runner._resolve(tactic, n).path)
    print(f"{cases} plans of paths {', '.join(sorted(paths))}; {replayed} were replayed")
    wanted = {"fused", "chain", "dequantized", "warp_specialized", "fp8", "fp8_once"}
    missing = wanted.union({"fp8_cuda", "fp8_once_cuda"} if nvrtc.why_missing() is None else ()) - paths
    if missing or replayed < 0.75 * cases:
        bad.append(f"paths {missing} were not run, or too few calls replayed: {replayed} of {cases}")
    return bad


def bound_and_warm(
    runner: TritonRunner, n: int, tactic: Any = -1
) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    inputs, workspace = inputs_at(runner, n), aligned(runner.workspace_bytes(n, tactic), torch.uint8)
    bound = runner.bind(inputs, tactic)
    bound(inputs, workspace)
    return bound, inputs, workspace


def when_it_is_not_replayed(driver: StubDriver) -> list[str]:
    """Hooks, another device, weights that lie elsewhere, two inputs that are one: launched as ever."""
    bad = []
    runner = runner_of(8, 2, 512, 256, "bf16")
    bound, inputs, workspace = bound_and_warm(runner, 16)
    ran: list[str] = []
    with patch.object(replay.Replay, "run", lambda self, *args: ran.append("replayed")):
        bound(inputs, workspace)
        if ran != ["replayed"]:
            bad.append("a warm call was not replayed")
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(print_nothing)
        bound(inputs, workspace)
        hooks.remove(print_nothing)
        with patch.object(replay, "_never", lambda: True):  # a graph is being captured
            captured, at, room = bound_and_warm(runner, 17)
            captured(at, room)
        driver.device = 1
        bound(inputs, workspace)
        driver.device = 0
        moved = runner._experts.gate_up.data
        moved.set_(moved.clone())
        want, got = (
            call(driver, lambda run=run: run()) for run in (lambda: runner.forward(inputs, workspace=workspace),
                                                            lambda: bound(inputs, workspace))
        )  # fmt: skip
        if want != got or not want:
            bad.append("weights that moved were launched where they were")
        if len(ran) != 1:
            bad.append(f"a call was replayed that must not be ({len(ran)})")
    same = [inputs[0], inputs[1], inputs[2], inputs[0]]
    made = runner.bind(same, -1)
    for _ in range(3):
        if call(driver, lambda: made(same, workspace)) != call(
            driver, lambda: runner.forward(same, workspace=workspace)
        ):
            bad.append("x as out differs")
    return bad


def print_nothing(*args: Any) -> None:
    """A profiler's hook."""


def what_is_kept(driver: StubDriver) -> list[str]:
    """Nothing of a call but its kernels: neither its tensors nor its scratch; and scratch must be large enough."""
    bad, runner = [], runner_of(8, 2, 512, 256, "nvfp4")
    for tactic in (-1, choose.fitted(runner.problem, choose.dequantized.LARGE)):
        bound, inputs, workspace = bound_and_warm(runner, 700, tactic)
        small = workspace[: workspace.numel() // 2]
        try:
            bound(inputs, small)
            bad.append("a workspace that is too small was taken")
        except moestro.ShapeError:
            pass
        alive = [weakref.ref(t) for t in (*inputs, workspace)]
        storages = [t.untyped_storage().data_ptr() for t in (*inputs, workspace)]
        del inputs, workspace, small
        gc.collect()
        held = {t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
        if any(reference() is not None for reference in alive) or held & set(storages):
            bad.append(f"{tactic} keeps a call's memory")
    return bad


def what_is_refused(driver: StubDriver) -> list[str]:
    """A launch that the written function would not repeat exactly is found out before it is ever replayed."""
    bad = []
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    theirs = replay._Writer._address
    for wrong in (
        lambda self, tensor: theirs(self, tensor).replace("scratch + ", "scratch + 256 + "),
        lambda self, tensor: {"x": "out", "out": "x"}.get(theirs(self, tensor), theirs(self, tensor)),
    ):
        with patch.object(replay._Writer, "_address", wrong):
            bound, inputs, workspace = bound_and_warm(runner, 16)
        want = call(driver, lambda: runner.forward(inputs, workspace=workspace))  # noqa: B023
        if call(driver, lambda: bound(inputs, workspace)) != want:  # noqa: B023
            bad.append("a wrong function was replayed")
    temporary = inputs_at(runner, 16)
    launches = runner.plan(temporary, -1, workspace)
    odd = replace(launches[0], args=(torch.zeros(64, dtype=torch.int32), *launches[0].args[1:]))
    held = replay.tensors_of([runner._experts.gate_up, runner._experts.down])
    origin = replay.Origin(temporary, workspace, runner._counters.of(0), held, workspace.numel())
    made = replay.bind([odd], [odd.run()], origin)
    if not isinstance(made, str) or "none of the call's" not in made:
        bad.append(f"a tensor made for one call was bound: {made}")
    return bad


def threads(driver: StubDriver) -> list[str]:
    """One plan in two threads: each call's launches have its own addresses."""
    runner = runner_of(8, 2, 512, 256, "nvfp4")
    bound, _, _ = bound_and_warm(runner, 8)
    seen: dict[int, list[tuple[Any, ...]]] = {}

    class Apart(list):  # type: ignore[type-arg]
        def append(self, launch: Any) -> None:
            seen.setdefault(threading.get_ident(), []).append(launch)

    driver.launched = Apart()
    bad: list[str] = []

    def work() -> None:
        for _ in range(50):
            inputs, workspace = inputs_at(runner, 8), aligned(runner.workspace_bytes(8, -1), torch.uint8)
            me = threading.get_ident()
            seen[me] = []
            runner.forward(inputs, workspace=workspace)
            want, seen[me] = seen[me], []
            bound(inputs, workspace)
            if seen[me] != want:
                bad.append("a call in two threads differs")

    running = [threading.Thread(target=work) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    driver.launched = []
    return bad


def main() -> list[str]:
    version = ".".join(triton.__version__.split(".")[:2])
    bad = []
    with stubbed() as driver, patch.object(replay, "KNOWN", (*replay.KNOWN, version)):
        replay.why_plain.cache_clear()
        for part in (every_path, when_it_is_not_replayed, what_is_kept, what_is_refused, threads):
            driver.device, driver.stream = 0, 0
            bad += [f"{part.__name__}: {b}" for b in part(driver)]
    return bad


if __name__ == "__main__":
    found = main()
    print("\n".join(found[:20]))
    sys.exit(bool(found))

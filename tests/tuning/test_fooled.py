"""Nothing fools the measurement: each test has a tactic 1 that is the fastest and lies, in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning_fakes import WRONG, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningWarning
from moestro.tuning import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from moestro.tuning.measure.compare import why_different
from moestro.tuning.measure.request import is_out_of_memory

TIMES = {-1: 4e-3, 0: 2e-3, 1: 1e-3}
Forward = Callable[[Any, Any, Any, bool], Any]


class Liar(TunableRunner):
    """y = 2x by `forward(runner, inputs, tactic, do_preparation)`; tactics 0 and 1."""

    def __init__(self, forward: Forward, **attributes: Any) -> None:
        self._clock, self._forward = quiet_clock(), forward
        self.__dict__.update(attributes)

    def get_valid_tactics(self, inputs: Any, profile: Any) -> list[int]:
        return [0, 1]

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        if not do_preparation:
            self._clock.advance(TIMES[tactic])
        return self._forward(self, inputs, tactic, do_preparation, **kwargs)


def chosen(runner: Liar, given: list[Any], dims: tuple[int, ...] = (0,), **kwargs: Any) -> Any:
    t = tuner(runner._clock)
    cfg = TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec(dims, (0,) * len(dims), (64,), lambda n: n),))
    with t.autotune(True):
        return t.choose_one("op", [runner], cfg, given, **kwargs)[1]


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


# --- who writes nothing ------------------------------------------------------------------------------------
def test_preparation_that_computes_the_answer_does_not_help_one_that_writes_nothing() -> None:
    def into_input(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        if tactic != 1:
            given[1].copy_(given[0] * 2)
        return given[1]

    assert chosen(Liar(into_input), [X, torch.empty_like(X)], (0, 1)) == 0

    def into_attribute(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        if prepares:
            self._kept = given[0] * 2
        return self._kept if tactic == 1 else given[0] * 2

    assert chosen(Liar(into_attribute), [X]) == 0


def test_the_runners_own_buffer_does_not_help_one_that_writes_nothing() -> None:
    def forward(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        if tactic != 1:
            self._out[: len(given[0])] = given[0] * 2
        return self._out

    assert chosen(Liar(forward, _out=torch.zeros(100, 8)), [X]) == 0


def test_an_out_argument_does_not_help_one_that_writes_nothing() -> None:
    def forward(self: Any, given: Any, tactic: Any, prepares: bool, out: Any = None) -> Any:
        if tactic != 1:
            out.copy_(given[0] * 2)

    assert chosen(Liar(forward), [X], out=torch.empty(64, 8)) == 0


def test_memory_that_a_right_result_was_in_does_not_help_one_that_writes_nothing() -> None:
    def forward(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        y = torch.empty(64, 8)  # the allocator gives the block that the last result was freed from
        return y if tactic == 1 else y.copy_(given[0] * 2)

    assert chosen(Liar(forward), [X]) == 0


def test_an_output_of_a_fixed_size_that_is_an_input_is_looked_at() -> None:
    def forward(self: Any, given: Any, tactic: Any, prepares: bool) -> None:
        if not prepares and tactic != 1:
            given[1].copy_(given[0].sum(0))

    assert chosen(Liar(forward), [X, torch.zeros(8)]) == 0


def test_what_is_read_and_written_is_not_poisoned() -> None:
    def forward(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        return given[1] if prepares else given[1].add_(given[0], alpha=3 if tactic == 1 else 2)

    total = torch.ones_like(X)
    assert chosen(Liar(forward), [X, total], (0, 1)) == 0


# --- who writes what is not his --------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["input", "argument", "attribute", "private attribute", "nested"])
def test_weights_that_a_tactic_overwrites_are_put_back_and_it_is_out(where: str) -> None:
    weight = torch.ones(8, 8)

    def forward(self: Any, given: Any, tactic: Any, prepares: bool, w: Any = None) -> Any:
        if tactic == 1 and not prepares:
            weight[3, 5] = 0.0
        return given[0] * 2

    held = {"attribute": {"w": None}, "private attribute": {"_w": weight}, "nested": {"_w": {"a": [weight]}}}
    attributes = held.get(where, {})
    runner = Liar(forward, **({"_w": weight} if where == "attribute" else attributes))
    given = [X, weight] if where == "input" else [X]
    assert chosen(runner, given, **({"w": weight} if where == "argument" else {})) == 0
    assert bool((weight == 1).all())


def test_workspaces_may_be_written() -> None:
    scratch = torch.zeros(256, dtype=torch.uint8)

    def forward(self: Any, given: Any, tactic: Any, prepares: bool) -> Any:
        if tactic == 1:
            scratch.random_(0, 255)
        return given[0] * 2

    assert chosen(Liar(forward, _workspace=scratch), [X]) == 1
    assert chosen(Liar(forward), [X, scratch]) == 1


# --- what is wrong somewhere -------------------------------------------------------------------------------
@dataclass
class Result:
    y: Any
    more: Any = None


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: Result(y),
        lambda y: {"y": [y, 1]},
        lambda y: (Result(Result(y)), "text"),
        lambda y: type("Odd", (), {"__slots__": ("y",), "__init__": lambda s, v: setattr(s, "y", v)})(y),
        lambda y: y.numpy(),
    ],
)
def test_results_inside_objects_are_compared(pack: Any) -> None:
    liar = Liar(lambda self, given, tactic, prepares: pack(given[0] * (3 if tactic == 1 else 2)))
    assert chosen(liar, [X]) == 0


def test_a_result_that_cannot_be_compared_leaves_the_default() -> None:
    liar = Liar(lambda self, given, tactic, prepares: object())
    assert chosen(liar, [X]) == -1


@given(st.integers(1, 300), st.integers(1, 200), st.data())
@settings(max_examples=40, deadline=None)
def test_one_wrong_row_among_many_is_seen_and_rounding_is_not(rows: int, columns: int, data: Any) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    y = torch.randn(rows, columns, generator=generator, dtype=torch.float64).float() + 3
    row = data.draw(st.integers(0, rows - 1))
    rounded = y * (1 + 1e-6 * torch.randn(y.shape, generator=generator))
    assert why_different(rounded, y, None, 1e-4) is None
    wrong = y.clone()
    wrong[row] = 0
    assert why_different(wrong, y, None, 1e-4) is not None
    integers = (y * 100).int()
    off = integers.clone()
    off[row, 0] += 1
    assert why_different(off, integers, None, 1.0) is not None


def test_one_wrong_row_of_65536_in_bf16_is_seen() -> None:
    y = torch.randn(65536, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    wrong = y.clone()
    wrong[40_000] = wrong[40_001]
    assert float((wrong - y).double().norm() / y.double().norm()) < 1e-2
    assert "row 40000" in str(why_different(wrong, y, None, 1e-2))


def test_nan_must_be_where_it_is() -> None:
    y = torch.randn(8, 8)
    y[2, 3] = torch.nan
    assert why_different(y.clone(), y, None, 1e-4) is None
    assert why_different(y.nan_to_num(0), y, None, 1e-4) is not None


# --- failures ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_memory_that_runs_out_is_known_by_every_name(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    wrapped = ValueError("kernel failed")
    wrapped.__cause__ = RuntimeError(text)
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))


@pytest.mark.parametrize("reading", [0.0, -1e-3, float("nan"), float("inf"), 1e9, 1e-12])
def test_one_odd_reading_of_the_clock_bans_nobody(reading: float, store: Path) -> None:
    for at in range(1, 9):
        clock, seen = quiet_clock(), [0]

        class Odd:
            name = "odd"

            def prepare(self, call: Any, clock: Any = clock, seen: Any = seen, at: int = at) -> Any:
                def sample() -> float:
                    before = clock.now
                    call()
                    seen[0] += 1
                    return reading if seen[0] == at else clock.now - before

                return sample

        runner = Kernel(clock, {-1: 1.2e-3, 0: 1.1e-3, 1: 1e-3, 2: 1.05e-3})
        t = AutoTuner(store / str(at), Odd(), clock=lambda clock=clock: clock.now)
        with t.autotune(True, budget_s=50):
            assert t.choose_one("op", [runner], config((64,)), inputs(64))[1] == 1, at
    assert not list(store.rglob("quarantine*"))


def test_a_default_that_fails_once_takes_part_again(store: Path) -> None:
    clock, busy = quiet_clock(), [True]
    times = {-1: lambda n: RuntimeError("device busy") if busy[0] else 1e-4, 0: 2e-3}
    runner, cfg, t = Kernel(clock, times), config((64,)), tuner(clock, store)
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64))[1] == 0
    busy[0] = False
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64))[1] == -1


# --- where it serves ---------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::moestro.errors.TuningWarning")
def test_a_tactic_serves_only_where_it_is_offered_else_the_next_best() -> None:
    class Small(Kernel):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
            n = inputs[0].shape[0]
            return ["fast", "good"] if n <= 64 else ["good"] if n <= 500 else []

    clock = quiet_clock()
    runner, cfg = Small(clock, {-1: 4e-3, "fast": 1e-3, "good": 2e-3}), config()
    t = tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    pick = t.bind("op", [runner], cfg)
    with pytest.warns(TuningWarning, match="not valid at 65"):  # and that it is beyond everything tuned
        assert t.choose_one("op", [runner], cfg, inputs(65))[1] == "good"
    for n, tactic in ((1, "fast"), (50, "fast"), (64, "fast"), (400, "good"), (1000, -1)):
        for _ in range(2):
            assert t.choose_one("op", [runner], cfg, inputs(n))[1] == pick(inputs(n))[1] == tactic


# --- short tunings -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("default", [0.04, 2.0])
def test_short_tunings_add_up(store: Path, default: float) -> None:
    clock = quiet_clock()
    times = {-1: default, **{i: 0.02 * (1 + (19 - i) / 20) for i in range(20)}}
    runner, cfg = Kernel(clock, times), config((64,))
    for _ in range(20):
        t = tuner(clock, store)  # a process of its own each time
        with t.autotune(True, budget_s=0.6):
            got = t.choose_one("op", [runner], cfg, inputs(64))[1]
    assert got == 19
    assert sum(tactic == -1 for _, tactic in runner._runs) < 0.4 * len(runner._runs)


# --- whatever happens ----------------------------------------------------------------------------------------
STEPS = st.lists(st.sampled_from(["tune", "short", "kill", "corrupt", "rename", "lose", "serve"]), max_size=8)


@given(STEPS, st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_no_sequence_of_events_serves_what_was_never_measured(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], seed: int
) -> None:
    root = tmp_path_factory.mktemp("events") / "store"
    clock = quiet_clock(seed=seed)
    runner = Kernel(
        clock, {-1: 4e-3, 0: lambda n: 1e-3 if n < 40 else ValueError("too large"), 1: 2e-3, 2: WRONG}
    )
    cfg = config((16, 64))
    t, intact = tuner(clock, root), True
    for step in steps:
        intact = intact and step not in ("corrupt", "rename", "lose")
        files = sorted(root.rglob("[0-9]*.json"))
        if step in ("tune", "short"):
            with t.autotune(True, budget_s=0.02 if step == "short" else None, crossover=False):
                t.choose_one("op", [runner], cfg, inputs(64))
        elif step == "kill":
            t = tuner(clock, root)  # another process
        elif step == "corrupt" and files:
            files[seed % len(files)].write_text(
                '{"schema": 1, "kind": "decision", "key": {}, "record": [' * 3
            )
        elif step == "rename" and files:
            files[seed % len(files)].rename(files[seed % len(files)].with_name("32.json"))
        elif step == "lose" and files:
            files[seed % len(files)].unlink()
        for n in (1, 16, 64):
            tactic = t.choose_one("op", [runner], cfg, inputs(n))[1]
            assert tactic != 2
            assert tactic == -1 or any(run == tactic for _, run in runner._runs)
            assert not (n == 64 and tactic == 0 and intact), "it raises there, which is known"


# --- inputs and budgets ------------------------------------------------------------------------------------
def test_what_a_silent_default_only_reads_never_holds_poison() -> None:
    seen: set[float] = set()

    class Reads(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kw: Any) -> Any:
            seen.update(inputs[0].unique().tolist())
            return super().forward(inputs, tactic, do_preparation, **kw)

    clock = quiet_clock()
    fill = lambda shape, dtype, device: torch.full(tuple(shape), 7.0, dtype=dtype, device=device)  # noqa: E731
    cfg, t = config((64,), tensor_initializers=((0, fill),)), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [Reads(clock, {-1: 2e-3, 0: 1e-3})], cfg, [torch.ones(64, 4)])[1] == 0
    assert seen == {7.0}


def test_a_silent_candidate_that_does_not_write_is_seen_where_the_answer_is_there_already() -> None:
    class Halves(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kw: Any) -> Any:
            if tactic != 0:
                inputs[1].copy_(inputs[0])  # what inputs[1] is made as, too
            return super().forward(inputs, tactic, do_preparation, **kw)

    clock, x = quiet_clock(), torch.arange(64, dtype=torch.int32).reshape(64, 1)
    spec = config((64,)).dynamic_tensor_specs[0]
    cfg = TuningConfig(dynamic_tensor_specs=(replace(spec, input_idx=(0, 1), dim_idx=(0, 0)),))
    t = tuner(clock)
    with t.autotune(True):
        got = t.choose_one("op", [Halves(clock, {-1: 2e-3, 0: 1e-3})], cfg, [x, x.clone()])[1]
    assert got == -1

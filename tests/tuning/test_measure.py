"""Same conditions for all, right before fast, quarantine, memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import WRONG, Fake, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError, TuningWarning
from moestro.tuning import ConstraintSpec, DynamicTensorSpec, Probe, TunableRunner, TuningConfig

FAST = {-1: 1e-3, 0: 5e-4, 1: 2e-4}


class Scale(TunableRunner):
    """y = 2 x on real tensors; a tactic's entry in `wrong` changes its result. Time per tactic on a clock."""

    def __init__(self, clock: Any, wrong: dict[Any, Any], times: dict[Any, float] | None = None) -> None:
        self._clock, self._wrong, self._times = clock, wrong, times or FAST
        self._runs: list[Any] = []

    def get_valid_tactics(self, inputs: Any, profile: Any) -> Any:
        return [t for t in self._times if t != -1]

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        if do_preparation:
            return None
        self._runs.append(tactic)
        self._clock.advance(self._times[tactic])
        change = self._wrong.get(tactic, lambda y: y)
        return change(inputs[0] * 2)


def tuned(runner: Any, size: int = 64, cfg: Any = None, **policy: Any) -> Any:
    t = tuner(runner._clock, **policy)
    with t.autotune(True):
        chosen = t.choose_one("op", [runner], cfg or config((64,)), [torch.ones(size, 3)])
    return t, chosen[1]


def nan(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[0, 0] = torch.nan
    return y


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.001, "differs"),
        (nan, "differs"),
        (lambda y: y[:-1], "is torch.float32"),
        (lambda y: y.double(), "float64"),
        (lambda y: (y, y), "2 outputs"),
        (lambda y: None, "differs"),
    ],
)
def test_a_candidate_that_is_wrong_is_quarantined_with_its_reason(change: Any, reason: str) -> None:
    runner = Scale(quiet_clock(), {1: change})
    t, tactic = tuned(runner)
    assert tactic == 0
    decision = t.decision("op", [runner], config((64,)), [torch.ones(64, 3)])
    found = decision.evidence.of(decision.record.runner, 1)
    assert found.fate == "quarantined"
    assert reason in found.reason


def test_small_differences_are_no_fault_and_verification_can_be_left_out() -> None:
    assert tuned(Scale(quiet_clock(), {1: lambda y: y * (1 + 1e-5)}))[1] == 1
    assert tuned(Scale(quiet_clock(), {1: lambda y: y * 2}), verify=False)[1] == 1


def test_a_runners_tolerance_counts() -> None:
    class Loose(Scale):
        def tolerance(self, inputs: Any) -> float:
            return 0.2

    assert tuned(Loose(quiet_clock(), {1: lambda y: y * 1.1}))[1] == 1
    assert tuned(Loose(quiet_clock(), {1: lambda y: y * 1.3}))[1] == 0


def test_a_candidate_that_writes_nothing_does_not_pass_for_its_predecessor() -> None:
    class Out(Scale):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            if do_preparation:
                return None
            self._clock.advance(self._times[tactic])
            if tactic != 1:
                inputs[1].copy_(inputs[0] * 2)
            return None

    runner = Out(quiet_clock(), {})
    t = tuner(runner._clock)
    cfg = TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec((0, 1), (0, 0), (64,), lambda x: 64),))
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, [torch.ones(64, 3), torch.zeros(64, 3)]) == (runner, 0)


def test_what_is_tuned_with_leaves_the_callers_tensors_alone() -> None:
    class InPlace(Scale):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            if do_preparation:
                return None
            self._clock.advance(self._times[tactic])
            return inputs[0].mul_(2)

    runner = InPlace(quiet_clock(), {})
    x = torch.ones(64, 3)
    t = tuner(runner._clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], config((64,)), [x]) == (runner, 1)
    assert torch.equal(x, torch.ones(64, 3))


def test_quarantine_is_remembered_on_disk_and_never_tried_again(store: Path) -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {**FAST, 2: WRONG})
    cfg = config()
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(8))
    assert sum(tactic == 2 for _, tactic in runner._runs) == 1
    fresh = tuner(clock, store)
    with fresh.autotune(True):
        fresh.choose_one("op", [runner], cfg, inputs(100))
    assert 100 in runner.sizes
    assert sum(tactic == 2 for _, tactic in runner._runs) == 1


def test_a_tactic_that_raises_is_out_at_that_size_and_tried_at_others(store: Path) -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {**FAST, 1: lambda n: ValueError("no such tile") if n > 64 else 2e-4})
    cfg, t = config((64, 128), lambda x: 64 if x <= 64 else 128), tuner(clock, store)
    with t.autotune(True, crossover=False):
        assert t.choose_one("op", [runner], cfg, inputs(128)) == (runner, 0)
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 1)
    assert runner._runs.count((128, 1)) == 1
    decision = t.decision("op", [runner], cfg, inputs(128))
    assert decision is not None
    found = decision.evidence.of(decision.record.runner, 1)
    assert found is not None
    assert (found.fate, found.reason) == ("failed", "ValueError: no such tile")
    assert not list(store.rglob("quarantine-*"))


def test_if_every_other_candidate_fails_the_default_serves_and_that_is_remembered() -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {-1: 1e-3, 0: ValueError("a"), 1: WRONG})
    cfg, t = config((64,)), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)
        decision = t.decision("op", [runner], cfg, inputs(64))
        assert decision is not None
        assert decision.status == "quarantined"
        runs = len(runner._runs)
        t.choose_one("op", [runner], cfg, inputs(64))
    assert len(runner._runs) == runs


def test_if_all_fail_they_are_tried_in_two_tunings_and_no_more() -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {-1: ValueError("d"), 0: ValueError("a")})
    cfg, t = config((64,)), tuner(clock)
    runs = []
    for _ in range(4):
        with t.autotune(True):
            assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)
        runs.append(len(runner._runs))
    assert runs[0] < runs[1] == runs[2] == runs[3]
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)


def test_a_failing_default_does_not_stop_the_others() -> None:
    clock = quiet_clock()
    a, b = Kernel(clock, {-1: ValueError("not here")}, name="a"), Kernel(clock, FAST, name="b")
    t = tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [a, b], config((64,)), inputs(64)) == (b, 1)


def oom_above(limit: int, seconds: float) -> Any:
    return lambda n: torch.OutOfMemoryError("CUDA out of memory") if n > limit else seconds


def test_out_of_memory_at_one_bucket_leaves_the_others_alone() -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {-1: oom_above(512, 1e-3), 0: oom_above(512, 5e-4)})
    cfg, t = config(), tuner(clock)
    with t.autotune(True), pytest.warns(TuningWarning, match="does not fit into memory"):
        t.choose_one("op", [runner], cfg, inputs(1000))
    for n in (1, 256, 512):
        assert t.choose_one("op", [runner], cfg, inputs(n)) == (runner, 0)
    runs = len(runner._runs)
    with t.autotune(True):
        assert t.choose_one("op", [runner], cfg, inputs(512)) == (runner, 0)
    assert len(runner._runs) == runs


def test_a_candidate_out_of_memory_is_out_at_that_bucket_only(store: Path) -> None:
    clock = quiet_clock()
    runner = Kernel(clock, {-1: 1e-3, 0: oom_above(100, 1e-4), 1: 5e-4})
    cfg, t = config((64, 128), lambda x: 64 if x <= 64 else 128), tuner(clock, store)
    with t.autotune(True, crossover=False):
        t.choose_one("op", [runner], cfg, inputs(128))
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    assert t.choose_one("op", [runner], cfg, inputs(128)) == (runner, 1)
    assert not list(store.rglob("quarantine-*"))


def test_preparation_and_workspaces_come_before_everything_else_and_once() -> None:
    clock = quiet_clock()
    steps: list[Any] = []

    class Hooked(Kernel):
        def reserve(self, inputs: Any, tactics: Any) -> None:
            steps.append(("reserve", inputs[0].shape[0], tuple(tactics)))

        def compile(self, inputs: Any, tactic: Any) -> None:
            steps.append(("compile", tactic, threading.current_thread() is threading.main_thread()))

        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            steps.append("prepare" if do_preparation else "run")
            return super().forward(inputs, tactic, do_preparation)

    t = tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [Hooked(clock, FAST)], config((64,)), inputs(64))
    assert steps[:2] == [("reserve", 64, (-1, 0, 1)), "prepare"]
    assert sorted(steps[2:5]) == [("compile", tactic, False) for tactic in (-1, 0, 1)]
    assert set(steps[5:]) == {"run"}


def test_a_tactic_that_fails_to_compile_is_quarantined_alone() -> None:
    clock = quiet_clock()

    class Hooked(Kernel):
        def compile(self, inputs: Any, tactic: Any) -> None:
            if tactic == 1:
                raise RuntimeError("too many registers")

    runner, t = Hooked(clock, FAST), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], config((64,)), inputs(64)) == (runner, 0)
    assert (64, 1) not in runner._runs


def test_keyword_arguments_reach_forward() -> None:
    clock = quiet_clock()
    seen: list[Any] = []

    class Wants(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return super().forward(inputs, tactic, do_preparation)

    t = tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [Wants(clock, FAST)], config((64,)), inputs(64), causal=True)
    assert all(kwargs == {"causal": True} for kwargs in seen)
    assert seen


def test_inputs_have_the_profiles_shapes_and_the_probes_values() -> None:
    clock = quiet_clock()
    shapes: set[Any] = set()

    class Looking(Kernel):
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            x, ids, w, none, three, out = inputs
            shapes.add((tuple(x.shape), tuple(ids.shape), tuple(out.shape), x.dtype, ids.dtype))
            assert w is weight
            assert none is None
            assert three == 3
            assert set(ids.unique().tolist()) <= {1, 2, 3}
            assert bool((x == 7).all())
            return super().forward(inputs, tactic, do_preparation)

    def sevens(inputs: Any, profile: Any, seed: int) -> Any:
        assert seed == 5
        assert profile.get_opt_shapes()[0] == tuple(inputs[0].shape)
        return [torch.full_like(inputs[0], 7), *inputs[1:]]

    weight = torch.zeros(4, 4)
    cfg = TuningConfig(
        dynamic_tensor_specs=(DynamicTensorSpec((0, 1), (0, 0), (2, 8), lambda x: 2 if x <= 2 else 8),),
        constraint_specs=(ConstraintSpec(5, 0, lambda shapes: shapes[0][0] * 2),),
        probes=(Probe("sevens", sevens),),
    )
    ins = [torch.zeros(3, 4).bfloat16(), torch.tensor([[1], [2], [3]]), weight, None, 3, torch.zeros(6, 4)]
    t = tuner(clock, seed=5)
    with t.autotune(True):
        t.choose_one("op", [Looking(clock, FAST)], cfg, ins)
    assert shapes == {((n, 4), (n, 1), (2 * n, 4), torch.bfloat16, torch.int64) for n in (2, 8)}
    assert t.decision("op", [Looking(clock, FAST)], cfg, [*ins[:5], torch.zeros(6, 4)]) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda inputs, profile, seed: inputs[:1], "must give 2 inputs, gave 1"),
        (lambda inputs, profile, seed: [Fake((1, 1)), inputs[1]], "of shape"),
        (lambda inputs, profile, seed: [Fake((64, 64), "int8"), inputs[1]], "int8"),
    ],
)
def test_a_probe_must_give_inputs_of_the_profile(make: Any, message: str) -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True), pytest.raises(TuningError, match=message):
        t.choose_one("op", [Kernel(clock, FAST)], config((64,), probes=(Probe("p", make),)), inputs(64))


def test_linked_dimensions_must_agree() -> None:
    clock = quiet_clock()
    cfg = TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec((0, 1), (0, 0), (64,), lambda x: 64),))
    with pytest.raises(TuningError, match="linked dimensions"):
        tuner(clock).choose_one("op", [Kernel(clock, FAST)], cfg, [Fake((3, 1)), Fake((4, 1))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), (0,), (), lambda x: x), "positive integer"),
        (((0,), (0,), (0,), lambda x: x), "positive integer"),
        (((0,), (0,), (1.5,), lambda x: x), "positive integer"),
        (((0, 1), (0,), (1,), lambda x: x), "one length"),
        (((), (), (1,), lambda x: x), "input_idx"),
        ((("a",), (0,), (1,), lambda x: x), "input_idx"),
        (((0,), (0,), (1,), 5), "map_to_tuning_buckets"),
        (((0,), (0,), (1,), lambda x: x, [None, None]), "tensor_initializers"),
    ],
)
def test_specifications_that_make_no_sense_are_errors(arguments: Any, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        DynamicTensorSpec(*arguments)


@pytest.mark.parametrize("generated", [[], [0], [1.5], ["a"], None, [-3]])
def test_a_generator_that_gives_no_buckets_is_an_error(generated: Any) -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True), pytest.raises(TuningError, match=r"gen_tuning_buckets\(64\)"):
        t.choose_one("op", [Kernel(clock, FAST)], config(lambda n: generated, lambda x: 1), inputs(64))


def test_a_map_that_gives_no_integer_is_an_error() -> None:
    clock = quiet_clock()
    t = tuner(clock)
    with t.autotune(True), pytest.raises(TuningError, match="map_to_tuning_buckets"):
        t.choose_one("op", [Kernel(clock, FAST)], config((64,), lambda x: x / 2), inputs(64))  # type: ignore[arg-type,return-value]


def test_a_dimension_outside_the_inputs_is_an_error() -> None:
    clock = quiet_clock()
    cfg = TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec((5,), (0,), (64,), lambda x: x),))
    with pytest.raises(TuningError, match="input_idx"):
        tuner(clock).choose_one("op", [Kernel(clock, FAST)], cfg, inputs(64))


def test_probes_must_have_different_names() -> None:
    probe = Probe("p", lambda inputs, profile, seed: inputs)
    with pytest.raises(TuningError, match="different names"):
        TuningConfig(probes=(probe, probe))


class Reserve(Kernel):
    """Slow, always there."""

    def last_resort(self, inputs: Any) -> bool:
        return True


def race_with_a_reserve(times: dict[Any, Any]) -> tuple[Kernel, Reserve, Any]:
    clock = quiet_clock()
    kernel, reserve, t = Kernel(clock, times), Reserve(clock, {-1: 1e-1, "r": 1e-5}), tuner(clock)
    with t.autotune(True, crossover=False):
        choice = t.choose_one("op", [kernel, reserve], config((64,)), inputs(64))
    return kernel, reserve, choice


def test_a_last_resort_is_not_raced_against_others() -> None:
    kernel, reserve, choice = race_with_a_reserve({-1: 1e-3, "a": 5e-4})
    assert choice == (kernel, "a")
    assert reserve.sizes == set()


def test_a_last_resort_is_tried_where_nothing_else_runs() -> None:
    bad = ValueError("bad")
    _, reserve, choice = race_with_a_reserve({-1: bad, "a": bad})
    assert choice == (reserve, "r")

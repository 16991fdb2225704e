"""Candidates that move what they are given, leave the program, or offer tactics in odd ways; forks; odd files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import StoreWarning, TuningError
from moestro.tuning import DynamicTensorSpec, TunableRunner, TuningConfig
from moestro.tuning.forks import Lock
from moestro.tuning.measure.request import is_out_of_memory
from moestro.tuning.store import sources

TIMES = {-1: 4e-3, 0: 2e-3, 1: 1e-3}
ONE = TuningConfig(dynamic_tensor_specs=(DynamicTensorSpec((0,), (0,), (64,), lambda n: n),))


class Mover(TunableRunner):
    """y = 2x; tactic 1 is the fastest and does `trick` to its inputs first."""

    def __init__(self, trick: Callable[[Any], Any]) -> None:
        self._clock, self._trick = quiet_clock(), trick

    def get_valid_tactics(self, inputs: Any, profile: Any) -> list[int]:
        return [1, 0]

    def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False) -> Any:
        if not do_preparation:
            self._clock.advance(TIMES[tactic])
        y = inputs[0] * 2
        if tactic == 1:
            self._trick(inputs)
        return y


def chosen(runner: Mover, given: list[Any]) -> Any:
    t = tuner(runner._clock)
    with t.autotune(True):
        return t.choose_one("op", [runner], ONE, given)[1]


def resized(given: Any) -> None:
    given[1].resize_(2, 2)


def grown(given: Any) -> None:
    given[1].resize_(64, 64)


def moved(given: Any) -> None:
    given[1].data = torch.zeros(8, 8)


def of_another_dtype(given: Any) -> None:
    given[1].data = torch.ones(8, 8, dtype=torch.float64)


def transposed(given: Any) -> None:
    given[1].t_()


@pytest.mark.parametrize("trick", [resized, grown, moved, of_another_dtype, transposed])
@pytest.mark.parametrize("parameter", [False, True])
def test_weights_that_a_tactic_moves_or_resizes_are_where_and_as_they_were(
    trick: Any, parameter: bool
) -> None:
    weights = torch.arange(64.0).reshape(8, 8)
    given = torch.nn.Parameter(weights.clone(), requires_grad=False) if parameter else weights.clone()
    address, view = given.data_ptr(), given.view(-1)
    assert chosen(Mover(trick), [torch.ones(64, 4), given]) == 0
    assert torch.equal(given, weights)
    assert (given.dtype, given.is_contiguous()) == (torch.float32, True)
    assert trick is grown or given.data_ptr() == address, "memory that has grown is other memory"
    assert torch.equal(view, weights.view(-1)), "what looked at the same memory still does"


@pytest.mark.parametrize(
    "trick", [lambda i: i.append(3), lambda i: i.__setitem__(0, i[0] * 3), lambda i: i.clear()]
)
def test_a_tactic_that_changes_its_list_of_inputs_changes_its_own_only(trick: Any) -> None:
    """Else the next candidate would get what it left, and be in quarantine for it."""
    given = [torch.ones(64, 4)]
    runner = Mover(trick)
    t = tuner(runner._clock)
    with t.autotune(True):
        t.choose_one("op", [runner], ONE, given)
    fates = {c.tactic: c.fate for c in t.decision("op", [runner], ONE, given).evidence.candidates}
    assert len(given) == 1
    assert fates[0] in ("finalist", "eliminated")


def test_a_tactic_that_leaves_the_program_is_out_and_the_tuning_goes_on() -> None:
    def leave(given: Any) -> None:
        raise SystemExit(3)

    runner, given = Mover(leave), [torch.ones(64, 4)]
    t = tuner(runner._clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], ONE, given)[1] == 0
    found = {c.tactic: c for c in t.decision("op", [runner], ONE, given).evidence.candidates}
    assert found[1].fate == "failed"
    assert "SystemExit(3)" in found[1].reason


def test_ctrl_c_in_a_tactic_ends_the_tuning_and_leaves_nothing_behind() -> None:
    def stop(given: Any) -> None:
        raise KeyboardInterrupt

    runner, weights = Mover(stop), torch.ones(8, 8)
    t = tuner(runner._clock)
    with pytest.raises(KeyboardInterrupt), t.autotune(True):
        t.choose_one("op", [runner], ONE, [torch.ones(64, 4), weights])
    assert not t.is_tuning_mode
    assert torch.equal(weights, torch.ones(8, 8))


def test_torchs_words_for_memory_that_a_gpu_does_not_have() -> None:
    assert is_out_of_memory(RuntimeError("Tried to allocate 20.00 GiB. GPU 0 has 10 GiB in total"))


@pytest.mark.parametrize(
    "offered", [lambda: np.array([1, 2]), lambda: iter((1, 2)), lambda: {1: "a", 2: "b"}]
)
def test_tactics_may_be_offered_in_any_container(offered: Any) -> None:
    class Odd(Kernel):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> Any:
            return offered()

    clock = quiet_clock()
    runner, t = Odd(clock, {-1: 4e-3, 1: 1e-3, 2: 2e-3}), tuner(clock)
    with t.autotune(True):
        assert t.choose_one("op", [runner], config((64,)), inputs(64))[1] == 1
    assert t.choose_one("op", [runner], config((64,)), inputs(48))[1] == 1


def test_true_is_not_tactic_1(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, {-1: 2e-3, 1: 1e-3}), config((64,))
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    (path,) = (p for p in store.rglob("*.json") if p.name != "environment.json")
    text = path.read_text()
    assert text.count('"tactic": 1') > 0
    path.write_text(text.replace('"tactic": 1', '"tactic": true'))
    with pytest.warns(Warning, match="True"):
        assert tuner(clock, store).choose_one("op", [runner], cfg, inputs(64))[1] == -1


def test_a_path_as_a_tactic_comes_back_as_a_path(store: Path) -> None:
    class Paths(TunableRunner):
        def __init__(self) -> None:
            self._clock = quiet_clock()

        def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
            return [Path("/a/b")]

        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False) -> Any:
            self._clock.advance(1e-3 if isinstance(tactic, PurePath) else 2e-3)

    runner = Paths()
    t = tuner(runner._clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], config((64,)), inputs(64))
    found = tuner(runner._clock, store).choose_one("op", [runner], config((64,)), inputs(64))[1]
    assert (found, type(found)) == (Path("/a/b"), type(Path()))


@pytest.mark.parametrize(
    ("cfg", "given", "says"),
    [
        (None, inputs(64), "config must be a TuningConfig, got NoneType"),
        (config((64,)), None, "inputs must be a list or tuple, got NoneType"),
        (config((64,)), torch.ones(64, 4), "inputs must be a list or tuple, got Tensor"),
        (config((64,)), 3, "inputs must be a list or tuple, got int"),
    ],
)
def test_what_is_no_configuration_or_no_list_of_inputs_is_named(cfg: Any, given: Any, says: str) -> None:
    clock = quiet_clock()
    t, runner = tuner(clock), Kernel(clock, TIMES)
    for ask in (t.choose_one, t.decision, t.explain):
        with pytest.raises(TuningError, match=says):
            ask("op", [runner], cfg, given)


# --- files and forks ---------------------------------------------------------------------------------------
def test_a_pipe_among_the_files_of_a_store_is_not_waited_for(store: Path) -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64,)), tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    (path,) = (p for p in store.rglob("*.json") if p.name != "environment.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(StoreWarning, match="no regular file"):
        assert tuner(clock, store).choose_one("op", [runner], cfg, inputs(64))[1] == -1


def in_child(body: Callable[[], bool]) -> bool:
    """Whether body() is true in a forked child that has 60 seconds for it."""
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(60)
        os._exit(0 if body() else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("which", [sources.PARSING, Lock(), Lock(threading.RLock)])
def test_a_lock_that_another_thread_holds_is_free_in_a_child(which: Lock) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with which:
            held.set()
            go.wait()

    def takes_it() -> bool:
        with which:
            return True

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(takes_it)
    finally:
        go.set()
        thread.join()


def test_a_child_that_was_forked_inside_the_block_of_a_lock_leaves_it() -> None:
    lock = Lock()
    with lock:
        child = in_child(lambda: lock.__exit__() is None and lock.__enter__() is None)
    assert child
    with lock:
        pass


def test_every_lock_of_the_tuner_and_of_what_serves_is_renewed_in_a_child() -> None:
    """A module's lock stays taken in a child for ever if a thread held it: forks.Lock, or `forked` of its owner."""
    source = Path(sources.__file__).parents[2]
    found = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if "threading.Lock()" in path.read_text() and "forked(self)" not in path.read_text()
    }
    # watch.py has its own rule for forks; counters.py counts kernels of one process's GPU, which no child has
    assert found <= {"tuning/lookup/watch.py", "kernels/triton/counters.py"}

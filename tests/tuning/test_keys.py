"""What a decision belongs to."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning_fakes import Fake, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning.spec.keys import static_key
from moestro.tuning.spec.plain_json import digest, to_json
from moestro.tuning.spec.runner import runner_identity, tactic_from_json, tactic_key


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    mode: Mode = Mode.A


Stages = namedtuple("Stages", "load compute")


def key(runners: Any = None, ins: Any = None, cfg: Any = None, op: str = "op", **kwargs: Any) -> str:
    runners = runners or [Kernel(quiet_clock(), {-1: 1.0})]
    return static_key(op, runners, cfg or config(), ins or inputs(8), kwargs).text


def test_the_dynamic_size_is_not_in_the_key() -> None:
    assert key(ins=inputs(8)) == key(ins=inputs(9))


def test_everything_else_is() -> None:
    clock = quiet_clock()
    a, b = Kernel(clock, {}, width=1), Kernel(clock, {}, width=2)
    keys = [
        key(),
        key(op="other"),
        key(ins=inputs(8, width=32)),
        key(ins=[Fake((8, 64), "float16"), Fake((64, 64))]),
        key(ins=[Fake((8, 64)), Fake((64, 64), "float16")]),
        key(ins=[Fake((8, 64), device="cuda:0"), Fake((64, 64), device="cuda:0")]),
        key(ins=[Fake((8, 64)), None]),
        key(ins=[Fake((8, 64)), 3]),
        key(ins=[Fake((8, 64)), 4]),
        key(ins=[Fake((8, 64)), True]),
        key(ins=[Fake((8, 64))]),
        key(cfg=config(use_cuda_graph=True)),
        key(causal=True),
        key(causal=False),
        key(causal=1),
        key([a]),
        key([b]),
        key([a, b]),
        key([b, a]),
    ]
    assert len(set(keys)) == len(keys)


def test_a_devices_number_is_not() -> None:
    one, two = ([Fake((8, 64), device=f"cuda:{i}"), Fake((64, 64), device=f"cuda:{i}")] for i in (0, 1))
    assert key(ins=one) == key(ins=two)


def test_extras_of_a_runner_are_in_the_key() -> None:
    class Extra(Kernel):
        def get_cache_key_extras(self, inputs: Any) -> tuple[Any, ...]:
            return (self._times["extra"],)

    clock = quiet_clock()
    assert key([Extra(clock, {"extra": 1})]) != key([Extra(clock, {"extra": 2})])
    with pytest.raises(TuningError, match="get_cache_key_extras"):
        key([Extra(clock, {"extra": object()})])


def test_a_call_after_the_extras_changed_has_another_decision() -> None:
    class Extra(Kernel):
        def get_cache_key_extras(self, inputs: Any) -> tuple[Any, ...]:
            return (inputs[1] is None,)

    clock = quiet_clock()
    runner, t, cfg = Extra(clock, {-1: 1e-3, 0: 5e-4}), tuner(clock), config((64,))
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, [Fake((64, 64)), None])
    for _ in range(2):
        assert t.choose_one("op", [runner], cfg, [Fake((64, 64)), None]) == (runner, 0)
        assert t.choose_one("op", [runner], cfg, [Fake((64, 64)), 3]) == (runner, -1)


def test_keyword_arguments_separate_decisions_and_tensors_among_them_by_dtype() -> None:
    clock = quiet_clock()
    runner, t, cfg = Kernel(clock, {-1: 1e-3, 0: 5e-4}), tuner(clock), config((64,))
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64), causal=True, bias=torch.zeros(3))
    for _ in range(2):
        assert t.choose_one("op", [runner], cfg, inputs(64), causal=True, bias=torch.ones(3)) == (runner, 0)
        assert t.choose_one("op", [runner], cfg, inputs(64), causal=False, bias=torch.ones(3)) == (runner, -1)
        assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, -1)


def test_real_tensors_hit_by_dtype_and_static_shape() -> None:
    clock = quiet_clock()
    runner, t, cfg = Kernel(clock, {-1: 1e-3, 0: 5e-4}), tuner(clock), config((64,))
    w = torch.zeros(4, 4)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, [torch.zeros(64, 4), w])
    for _ in range(3):
        assert t.choose_one("op", [runner], cfg, [torch.zeros(9, 4), w]) == (runner, 0)
        assert t.choose_one("op", [runner], cfg, [torch.zeros(9, 5), w]) == (runner, -1)
        assert t.choose_one("op", [runner], cfg, [torch.zeros(9, 4).half(), w]) == (runner, -1)
        assert t.choose_one("op", [runner], cfg, [torch.zeros(4, 9).t(), w]) == (runner, 0)
        with torch.inference_mode():
            assert t.choose_one("op", [runner], cfg, [torch.zeros(9, 4), w]) == (runner, 0)
        w.data = torch.zeros(4, 5)
        assert t.choose_one("op", [runner], cfg, [torch.zeros(9, 4), w]) == (runner, -1)
        w.data = torch.zeros(4, 4)


def test_identity_is_class_and_public_configuration() -> None:
    clock = quiet_clock()
    public = {"dtype": torch.bfloat16, "tile": Tile(1, 2), "names": ["a"], "mode": Mode.B, "eps": 1e-6}
    runner = Kernel(clock, {}, **public, _scratch=object(), plan_cache=object())
    identity = runner_identity(runner)
    assert identity["class"].endswith("Kernel")
    assert set(identity["config"]) == set(public)
    assert identity == runner_identity(Kernel(quiet_clock(), {-1: 2.0}, **public))


@pytest.mark.parametrize("value", [object(), lambda x: x, torch.zeros(2), {"deep": [object()]}])
def test_an_attribute_that_cannot_be_serialised_is_an_error_naming_it(value: Any) -> None:
    with pytest.raises(TuningError, match="'workspace' of runner"):
        key([Kernel(quiet_clock(), {}, workspace=value)])


tactics = st.recursive(
    st.integers()
    | st.text(max_size=5)
    | st.booleans()
    | st.none()
    | st.builds(Tile, st.integers(), st.integers()),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.tuples(inner, inner).map(lambda p: Stages(*p)),
    max_leaves=8,
)


@given(tactics)
def test_a_tactic_comes_back_from_json_as_it_was(tactic: Any) -> None:
    back = tactic_from_json(tactic_key(tactic, None))
    assert back == tactic
    assert type(back) is type(tactic)


@given(tactics, tactics)
def test_different_tactics_have_different_json(one: Any, other: Any) -> None:
    if json.dumps(tactic_key(one, None)) == json.dumps(tactic_key(other, None)):
        assert one == other
        assert type(one) is type(other)


def test_a_list_counts_as_a_tuple() -> None:
    assert tactic_from_json(tactic_key([128, [1, 2]], None)) == (128, (1, 2))


@pytest.mark.parametrize("tactic", [{"a": 1}, {1, 2}, object(), (1, object()), lambda: 0, torch.zeros(1)])
def test_a_tactic_that_cannot_be_stored_is_an_error_naming_the_runner(tactic: Any) -> None:
    with pytest.raises(TuningError, match="tactic of runner Kernel"):
        tactic_key(tactic, Kernel(quiet_clock(), {}))


def test_keys_are_the_same_in_another_process() -> None:
    code = (
        "from moestro.tuning.spec.plain_json import *; import torch\n"
        "print(digest(to_json({'a': (1, 2.5, 'x'), 'b': {3, 1, 2}, 'c': torch.bfloat16, 'd': print})))"
    )
    value = {"a": (1, 2.5, "x"), "b": {3, 1, 2}, "c": torch.bfloat16, "d": print}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(to_json(value))

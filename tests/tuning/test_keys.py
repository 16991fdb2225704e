"""What a decision belongs to."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning_fakes import Fake, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.spec.keys import static_key
from moestro.tuning.spec.plain_json import OMIT_DEFAULT, digest, from_json, to_json
from moestro.tuning.spec.runner import runner_identity, stored_tactic, tactic_from_json, tactic_key


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


@pytest.mark.parametrize(
    "value", [object(), lambda x: x, torch.zeros(2), torch.nn.Linear(1, 1), {"deep": [len, object()]}]
)
def test_an_attribute_without_a_value_counts_by_its_class_with_one_warning(value: Any) -> None:
    class Holder(Kernel):
        pass

    Holder.__qualname__ = f"Holder of {type(value).__name__} {id(value)}"
    runner = Holder(quiet_clock(), {}, workspace=value)
    with pytest.warns(TuningWarning, match="'workspace' of runner") as caught:
        first, second = key([runner]), key([runner])
    assert first == second
    assert len(caught) == 1
    assert key([Holder(quiet_clock(), {}, workspace=type("Other", (), {})())]) != first


def test_the_same_object_is_one_identity_in_this_process_and_another_one_is_not() -> None:
    clock, t, cfg = quiet_clock(), tuner(quiet_clock()), config((64,))
    handles = [type("Handle", (), {})() for _ in range(2)]
    runners = [Kernel(clock, {-1: 1e-3, 0: 5e-4}, handle=handle) for handle in (*handles, handles[0])]
    t = tuner(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        with t.autotune(True):
            t.choose_one("op", [runners[0]], cfg, inputs(64))
        found = [t.choose_one("op", [runner], cfg, inputs(64))[1] for runner in runners]
    assert found == [0, -1, 0]


def test_an_object_without_a_value_is_found_by_its_class_in_another_process(store: Path) -> None:
    clock, cfg = quiet_clock(), config((64,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        t = tuner(clock, store)
        with t.autotune(True):
            t.choose_one("op", [Kernel(clock, {-1: 1e-3, 0: 5e-4}, handle=object())], cfg, inputs(64))
        fresh = tuner(clock, store)  # what a new process has
        runner = Kernel(clock, {-1: 1e-3, 0: 5e-4}, handle=object())
        assert fresh.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)


def test_unique_id_of_tensorrt_llm_is_the_configuration() -> None:
    class Moe(Kernel):
        def unique_id(self) -> Any:
            return (torch.bfloat16, 8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = key([Moe(quiet_clock(), {}, handle=object())])
        assert one == key([Moe(quiet_clock(), {}, handle=object(), more=3)])


def test_equal_dictionaries_are_one_key_whatever_their_order() -> None:
    clock = quiet_clock()
    one, other = ({"a": 1, "b": {"x": 1, "y": 2}}, {"b": {"y": 2, "x": 1}, "a": 1})
    assert key([Kernel(clock, {}, opts=one)]) == key([Kernel(clock, {}, opts=other)])
    assert key([Kernel(clock, {}, opts=one)]) != key([Kernel(clock, {}, opts={**one, "a": 2})])


def local_class() -> Any:
    @dataclass(frozen=True)
    class Local:
        m: int

    return Local


Local = local_class()

tactics = st.recursive(
    st.integers()
    | st.text(max_size=5)
    | st.booleans()
    | st.none()
    | st.builds(Tile, st.integers(), st.integers()),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.tuples(inner, inner).map(lambda p: Stages(*p)),
    max_leaves=8,
)
given_tactics = st.recursive(
    tactics
    | st.binary(max_size=4)
    | st.just(torch.bfloat16)
    | st.just(PurePosixPath("a/b"))
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(given_tactics)
def test_a_tactic_comes_back_from_json_as_it_was_given(tactic: Any) -> None:
    tactic_key(tactic, None)
    back = tactic_from_json(json.loads(json.dumps(to_json(stored_tactic(tactic)))))
    assert back == tactic
    assert type(back) is type(tactic) or isinstance(tactic, PurePosixPath)


@given(tactics, tactics)
def test_different_tactics_have_different_json(one: Any, other: Any) -> None:
    if json.dumps(tactic_key(one, None)) == json.dumps(tactic_key(other, None)):
        assert one == other
        assert type(one) is type(other)


def test_a_list_counts_as_a_tuple() -> None:
    assert tactic_from_json(tactic_key([128, [1, 2]], None)) == (128, (1, 2))


def test_a_sequence_of_another_library_is_stored_as_a_tuple() -> None:
    class Array:
        def __init__(self, *values: Any) -> None:
            self.values = values

        def __iter__(self) -> Any:
            return iter(self.values)

        def __len__(self) -> int:
            return len(self.values)

    assert stored_tactic((Array(1, 2), 3)) == ((1, 2), 3)
    assert tactic_key((Array(1, 2), 3), None) == tactic_key(([1, 2], 3), None)


@pytest.mark.parametrize(
    "tactic", [{1, 2}, {"a": object()}, print, Local(1), object(), (1, object()), lambda: 0, torch.zeros(1)]
)
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


@dataclass(frozen=True)
class Problem:
    rows: int
    added: bool = field(default=False, metadata=OMIT_DEFAULT)
    sizes: tuple[int, ...] = field(default_factory=tuple, metadata={"omit_default": True})


def test_a_field_added_with_omit_default_leaves_older_keys_as_they_were() -> None:
    before = {"object": to_json(Problem(3))["object"], "fields": {"rows": 3}}
    assert to_json(Problem(3)) == before
    assert to_json(Problem(3, added=True))["fields"] == {"rows": 3, "added": True}
    assert to_json(Problem(3, added=0))["fields"] == {"rows": 3, "added": 0}  # type: ignore[arg-type]  # equal, but another value
    assert to_json(Problem(3, sizes=(1,)))["fields"] == {"rows": 3, "sizes": [1]}


def test_a_field_left_out_reads_as_its_default() -> None:
    for value in (Problem(3), Problem(3, True), Problem(3, False, (2,))):
        assert from_json(to_json(value)) == value

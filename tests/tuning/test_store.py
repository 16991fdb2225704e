"""Decisions on disk."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import StoreWarning, TuningWarning
from moestro.tuning import MeasurementPolicy, Store

TIMES = {-1: 1e-3, 0: 5e-4, (128, "swap"): 4e-4}


@dataclass(frozen=True)
class Tile:
    m: int
    swap: bool = False


def tune(store: Path, size: int = 100, times: Any = None, cfg: Any = None, **policy: Any) -> Kernel:
    clock = quiet_clock()
    runner = Kernel(clock, times or TIMES)
    t = tuner(clock, store, **policy)
    with t.autotune(True):
        t.choose_one("my/op", [runner], cfg or config(), inputs(size))
    return runner


def fresh(store: Path, size: int = 100, times: Any = None, cfg: Any = None, **policy: Any) -> Any:
    clock = quiet_clock()
    runner = Kernel(clock, times or TIMES)
    return tuner(clock, store, **policy).choose_one("my/op", [runner], cfg or config(), inputs(size))[1]


def files(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*.json") if p.name not in {"environment.json"})


def test_a_decision_is_one_readable_file(store: Path) -> None:
    tune(store, 100)
    assert {p.name for p in files(store)} == {f"{n}.json" for n in (1, 2, 4, 8, 16, 32, 64, 100)}
    data = json.loads(next(p for p in files(store) if p.name == "64.json").read_text())
    assert data["op"] == "my/op"
    assert data["record"]["tactic"] == [128, "swap"]
    assert data["key"]["inputs"][0]["shape"] == [None, 64]
    environment = json.loads(next(store.glob("*/environment.json")).read_text())["facts"]
    assert {"device", "torch", "triton", "sources", "clock", "policy"} <= set(environment)


def test_another_process_finds_it(store: Path) -> None:
    tune(store)
    for n in (1, 50, 100):
        assert fresh(store, n) == (128, "swap")


@pytest.mark.parametrize("tactic", [3, "name", (1, (2, "x")), Tile(64, True), (Tile(1), None)])
def test_every_kind_of_tactic_comes_back(store: Path, tactic: Any) -> None:
    times = {-1: 1e-3, tactic: 1e-4}
    tune(store, times=times)
    assert fresh(store, times=times) == tactic
    assert type(fresh(store, times=times)) is type(tactic)


def test_a_list_tactic_is_served_as_a_list(store: Path) -> None:
    class Lists(Kernel):
        def get_valid_tactics(self, inputs: Any, profile: Any) -> Any:
            return [[128, 0]]

        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            self._clock.advance(1e-3 if tactic == -1 else 1e-4)

    clock = quiet_clock()
    t = tuner(clock, store)
    with t.autotune(True):
        assert t.choose_one("op", [Lists(clock, {})], config((8,)), inputs(8))[1] == [128, 0]
    assert tuner(clock, store).choose_one("op", [Lists(clock, {})], config((8,)), inputs(8))[1] == [128, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"schema": 0}',
        '{"schema": 99, "kind": "decision"}',
        '{"schema": 1, "kind": "decision", "key": {}}',
        '{"schema": 1, "kind": "decision", "key": {}, "record": {}}',
        '{"schema": 1, "kind": "someone else\'s", "key": {}}',
        "\x00\xff",
    ],
)
def test_what_cannot_be_read_is_a_miss_with_one_warning_and_stays(store: Path, text: str) -> None:
    tune(store, cfg=config((64, 100)))
    broken = next(p for p in files(store) if p.name == "64.json")
    broken.write_text(text)
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config((64, 100)), tuner(clock, store)
    with pytest.warns(StoreWarning, match=r"64\.json") as caught:
        found = [t.choose_one("my/op", [runner], cfg, inputs(n)) for n in (100, 1, 64, 100)]
    assert len(caught) == 1
    assert found == [(runner, (128, "swap"))] * 4
    assert broken.read_text() == text
    with t.autotune(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        t.choose_one("my/op", [runner], cfg, inputs(100))
    assert 64 in runner.sizes
    assert fresh(store, 64, cfg=cfg) == (128, "swap"), "tuning again has replaced it"


def test_a_tactic_whose_class_is_gone_is_a_miss(store: Path) -> None:
    tune(store, times={-1: 1e-3, Tile(64): 1e-4}, cfg=config((64,)))
    path = files(store)[0]
    path.write_text(path.read_text().replace(":Tile", ":Gone"))
    with pytest.warns(StoreWarning, match="Gone"):
        assert fresh(store, cfg=config((64,))) == -1


@pytest.mark.parametrize("name", ["os:system", "builtins:eval", "subprocess:Popen", "json:JSONDecoder"])
def test_a_file_cannot_make_arbitrary_objects(store: Path, name: str) -> None:
    tune(store, times={-1: 1e-3, Tile(64): 1e-4}, cfg=config((64,)))
    path = files(store)[0]
    data = json.loads(path.read_text())
    data["record"]["tactic"] = {"object": name, "fields": {}}
    path.write_text(json.dumps(data))
    with pytest.warns(StoreWarning, match="not a dataclass"):
        assert fresh(store, cfg=config((64,))) == -1


def test_a_store_that_cannot_be_written_leaves_decisions_in_memory_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config(), tuner(clock, tmp_path / "file" / "store")
    with t.autotune(True), pytest.warns(StoreWarning, match="cannot be written") as caught:
        t.choose_one("op", [runner], cfg, inputs(100))
    assert len([w for w in caught if w.category is StoreWarning]) == 1
    assert t.choose_one("op", [runner], cfg, inputs(70)) == (runner, (128, "swap"))


def test_a_decision_of_another_environment_is_not_used_but_tried_first(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {-1: 1e-3, **dict.fromkeys(range(6), 0.0006), 7: 4e-4}
    tune(store, times=many, cfg=config((64,)))
    monkeypatch.setattr("moestro.machine.version", lambda package: "99.0")
    assert fresh(store, times=many, cfg=config((64,))) == -1
    runner = tune(store, times=many, cfg=config((64,)))
    order = list(dict.fromkeys(tactic for _, tactic in runner._runs))
    assert order[:2] == [-1, 7], "the default is verified against, then the warm one"
    assert len([p for p in store.iterdir() if p.is_dir()]) == 2
    assert fresh(store, times=many, cfg=config((64,))) == 7


def test_policy_and_clock_are_part_of_the_environment(store: Path) -> None:
    tune(store)
    assert fresh(store, min_gain=0.05) == -1
    assert fresh(store) == (128, "swap")


def test_changed_sources_are_another_environment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(store)
    monkeypatch.setattr("moestro.tuning.store.sources.file_digests", lambda path: frozenset({"changed"}))
    assert fresh(store) == -1


def test_kernel_sources_count(tmp_path: Path) -> None:
    from moestro.tuning.store.sources import file_digests, source_digest

    class Sourced(Kernel):
        def kernel_sources(self) -> list[Path]:
            return [tmp_path / "kernel.cu"]

    (tmp_path / "kernel.cu").write_text("a")
    before = source_digest([Sourced(quiet_clock(), {})])
    (tmp_path / "kernel.cu").write_text("b")
    file_digests.cache_clear()
    assert source_digest([Sourced(quiet_clock(), {})]) != before


def test_a_miss_is_logged_once_for_each_doubling(store: Path) -> None:
    tune(store, 100)
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, TIMES), config(), tuner(clock, store)
    with pytest.warns(TuningWarning) as caught:
        found = [t.choose_one("my/op", [runner], cfg, inputs(n)) for n in [*range(101, 1200, 7), 20_000]]
    assert set(found) == {(runner, (128, "swap"))}
    assert len(caught) == 6  # 128, 256, 512, 1024, 2048 and 32768
    assert len(list(store.rglob("miss-*.json"))) == 6


def test_files_of_different_probe_sets_live_side_by_side(store: Path) -> None:
    from moestro.tuning import Probe

    probes = [Probe("zipf", lambda inputs, profile, seed: inputs)]
    tune(store, cfg=config((64,)))
    tune(store, cfg=config((64,), probes=tuple(probes)))
    assert len(files(store)) == 2


def test_nothing_is_created_by_look_ups(store: Path) -> None:
    assert fresh(store) == -1
    assert not store.exists()


def test_no_temporary_files_are_left(store: Path) -> None:
    tune(store)
    assert not [p for p in store.rglob("*") if p.name.endswith(".tmp")]


def test_a_path_a_string_and_a_store_are_the_same(tmp_path: Path) -> None:
    from moestro.tuning import AutoTuner

    for given in (str(tmp_path), tmp_path, Store(tmp_path)):
        found = AutoTuner(given).store
        assert found is not None
        assert found.root == tmp_path
    assert AutoTuner().store is None
    assert AutoTuner(policy=MeasurementPolicy(seed=3)).policy.seed == 3
    assert os.fspath(tmp_path)


SOURCE = '''"""A module."""

import os  # why

def f(x):
    """What it does.

    More of it."""
    # nothing
    return "kept" + x
'''


def test_comments_docstrings_and_empty_lines_are_not_code() -> None:
    from moestro.tuning.store.sources import code_of

    assert code_of(SOURCE) == 'import os\n\ndef f(x):\n    return "kept" + x'.replace("\n\n", "\n")
    assert code_of(SOURCE.replace("why", "because").replace("More of it", "Less")) == code_of(SOURCE)
    assert code_of(SOURCE.replace('"kept"', '"changed"')) != code_of(SOURCE)


def test_a_file_that_is_not_python_counts_as_it_is(tmp_path: Path) -> None:
    from moestro.tuning.store.sources import file_digests

    paths = [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.cpp", tmp_path / "d.cpp"]
    for path, text in zip(paths, ("def (", "def (  # x", "int x;", "int x; // y"), strict=True):
        path.write_text(text)
    assert len({file_digests(str(path)) for path in paths}) == 4
    assert file_digests(str(tmp_path / "none")) == {"unreadable"}

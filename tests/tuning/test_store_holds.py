"""Whatever becomes of a store's files, a look-up is a hit or a miss with a warning: never an exception, never a
decision that nobody measured.
"""

from __future__ import annotations

import json
import os
import stat
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner
from typer.testing import CliRunner

from moestro.cli.app import app
from moestro.errors import StoreWarning, TuningError
from moestro.tuning import AutoTuner, Store
from moestro.tuning.lookup import watch
from moestro.tuning.store.bundle import read_bundle
from moestro.tuning.store.store import default_root, default_store

TIMES = {-1: 1e-3, 0: 5e-4, 1: 8e-4}
CFG = config((16, 64))


def tuned(store: Path, op: str = "op", cfg: Any = CFG, size: int = 64) -> None:
    clock = quiet_clock()
    t = tuner(clock, store)
    with t.autotune(True, crossover=False):
        t.choose_one(op, [Kernel(clock, TIMES)], cfg, inputs(size))


def served(store: Path, op: str = "op", cfg: Any = CFG, size: int = 64) -> tuple[Any, list[str]]:
    """(tactic, warnings) of a new process's look-up."""
    clock = quiet_clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tactic = tuner(clock, store).choose_one(op, [Kernel(clock, TIMES)], cfg, inputs(size))[1]
    return tactic, [str(w.message) for w in caught if w.category is StoreWarning]


def decisions(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*.json") if p.name in {"16.json", "64.json"})


def edit(path: Path, **record: Any) -> None:
    data = json.loads(path.read_text())
    data["record"].update(record)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"runner": "other.Runner"},
        {"bucket": []},
        {"bucket": [0]},
        {"bucket": [64, 64]},
        {"bucket": [-64]},
        {"bucket": [64.5]},
        {"bucket": ["64"]},
        {"bucket": [2**80]},
        {"bucket": None},
        {"tuned_for": [1, 2]},
        {"tuned_for": 5},
        {"status": "perhaps"},
        {"created": float("nan")},
        {"created": "today"},
        {"complete": "yes"},
        {"probes": 3},
        {"probes": [3]},
        {"tactic": {"object": "json:JSONDecoder", "fields": {}}},
        {"tactic": {"enum": "enum:Enum", "name": "x"}},
        {"tactic": {"dict": [1]}},
        {"tactic": {"text": "torch.nothing", "type": "torch:dtype"}},
        {"evidence": {"candidates": [{"runner": 1}]}},
        {"evidence": {"candidates": [], "policy": 3}},
        {"evidence": None},
    ],
)
def test_a_record_that_makes_no_sense_is_a_miss_with_one_warning(
    store: Path, changes: dict[str, Any]
) -> None:
    tuned(store)
    for path in decisions(store):
        edit(path, **changes)
    tactic, said = served(store)
    assert tactic == -1
    assert len(said) == 2, "one for each of the two files"


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "9" * 5000, "\udcff"])
def test_a_file_that_no_parser_likes_is_a_miss_in_serving_and_in_every_command(
    store: Path, text: str
) -> None:
    tuned(store)
    victim = next(p for p in decisions(store) if p.name == "64.json")
    victim.write_bytes(text.encode(errors="surrogateescape"))
    tactic, said = served(store)
    assert (tactic, len(said)) == (0, 1), "the other bucket serves"
    bundle = store.parent / "bundle.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for command in (
            ["list"], ["show"], ["export", str(bundle)], ["prune", "--dry-run", "--kind", "decision"],
        ):  # fmt: skip
            done = CliRunner().invoke(app, ["cache", *command, "--store", str(store)])
            assert done.exit_code == 0, (command, done.output, done.exception)
        assert CliRunner().invoke(app, ["cache", "diff", str(store), str(bundle)]).exit_code == 0
    victim.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TuningError):
        read_bundle(victim)


def test_a_file_of_another_key_or_another_bucket_is_foreign(store: Path) -> None:
    tuned(store)
    tuned(store, "other")
    by_op = {
        op: next(p for p in decisions(store) if p.parent.name.startswith(op) and p.name == "64.json")
        for op in ("op", "other")
    }
    text = by_op["op"].read_text()
    by_op["op"].write_text(by_op["other"].read_text())
    assert served(store)[1][0].endswith("it is not used")
    by_op["op"].write_text(text)
    by_op["op"].rename(by_op["op"].with_name("128.json"))
    tactic, said = served(store)
    assert (tactic, len(said)) == (0, 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["cut", "flip", "swap", "rename", "drop", "empty", "field", "tune", "serve"]),
            st.integers(0, 10_000),
            st.one_of(
                st.none(),
                st.integers(),
                st.text(max_size=4),
                st.lists(st.integers(), max_size=3),
                st.floats(),
            ),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_sequence_of_damage_and_tuning_ends_in_an_exception_or_an_unmeasured_decision(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, Any]]
) -> None:
    store = tmp_path_factory.mktemp("store")
    tuned(store)
    tuned(store, "other")
    for what, number, value in steps:
        damage(store, what, number, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)
            if what == "tune":
                tuned(store)
            for size in (1, 16, 64):
                assert served(store, size=size)[0] in TIMES
                assert served(store, "other", size=size)[0] in TIMES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        tuned(store)
        assert served(store)[0] == 0, "tuning again mends it"


def damage(store: Path, what: str, number: int, value: Any) -> None:
    """One thing that may happen to the files of a store."""
    paths = sorted(p for p in store.rglob("*") if p.is_file())
    if not paths:
        return
    path, other = paths[number % len(paths)], paths[(number // 7) % len(paths)]
    content = path.read_bytes()
    if what == "cut":
        path.write_bytes(content[: number % (len(content) + 1)])
    elif what == "flip" and content:
        at = number % len(content)
        path.write_bytes(content[:at] + bytes([(content[at] + 1 + number % 255) % 256]) + content[at + 1 :])
    elif what == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif what == "rename":
        path.replace(path.with_name(f"{number}.json"))
    elif what == "drop":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "field":
        try:
            data = json.loads(content)
            record = data["record"]
            record[sorted(record)[number % len(record)]] = value
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            return
        if record.get("tactic") in TIMES:  # another one is caught where it is offered (test_validity)
            path.write_text(json.dumps(data))


# --- where it is -------------------------------------------------------------------------------------
def test_a_relative_store_stays_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    store = Store("decisions")
    monkeypatch.chdir(tmp_path / "b")
    assert store.root == tmp_path / "a" / "decisions"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/x").root == tmp_path / "x"


@pytest.mark.parametrize("path", ["a\0b", "", b"bytes", 3, "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be_one_is_an_error_that_names_it(path: Any) -> None:
    with pytest.raises(TuningError, match="must be a folder's path"):
        AutoTuner(store=path)


def test_a_path_that_is_too_long_leaves_decisions_in_memory_with_one_warning(tmp_path: Path) -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, tmp_path / ("y" * 300))
    with pytest.warns(StoreWarning, match="cannot be written") as caught, t.autotune(True):
        t.choose_one("op", [runner], CFG, inputs(64))
    assert len(caught) == 1
    assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, 0)


def test_without_a_home_decisions_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: Any) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOESTRO_STORE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", homeless)
    with pytest.raises(TuningError, match="MOESTRO_STORE"):
        default_root()
    with pytest.warns(StoreWarning, match="stay in memory"):
        assert default_store() is None


def test_files_have_the_permissions_of_the_umask(store: Path) -> None:
    before = os.umask(0o022)
    try:
        tuned(store)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in store.rglob("*.json")} == {0o644}


# --- what other processes do -------------------------------------------------------------------------
def test_reload_sees_what_another_process_has_tuned_since(store: Path) -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, store)
    pick = t.bind("op", [runner], CFG)
    assert pick(inputs(64)) == (runner, -1)
    tuned(store)
    assert t.reload() == 2
    assert pick(inputs(64)) == t.choose_one("op", [runner], CFG, inputs(64)) == (runner, 0)
    assert t.reload() == 0


def test_the_background_pass_reads_only_what_has_changed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, store)
    assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, -1)
    tuned(store)
    t._known.look_for_changes()
    assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, 0)
    monkeypatch.setattr(Store, "load", lambda *_: pytest.fail("read again without need"))
    t._known.look_for_changes()


def test_a_cache_that_was_only_opened_serves_after_its_context(store: Path) -> None:
    tuned(store)
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock)
    with t.autotune(False, cache=store):
        pass
    assert t.choose_one("op", [runner], CFG, inputs(64)) == (runner, 0)


def test_what_is_excluded_from_the_cache_stays_in_this_process(store: Path) -> None:
    cfg = config((16, 64), exclude_from_cache=True)
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, store)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    assert t.choose_one("op", [runner], cfg, inputs(64)) == (runner, 0)
    assert not store.exists()


def test_what_the_background_reader_finds_wrong_is_logged_and_warns_nobody_else(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = quiet_clock()
    t, runner, cfg = tuner(clock, store), Kernel(clock, {-1: 2e-3, 0: 1e-3}), config((64,))
    monkeypatch.setattr(watch, "INTERVAL_S", 0.02)
    monkeypatch.setattr(watch, "_owner", 0)  # a thread of this test's own, at this interval
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    (entry,) = (p for p in store.rglob("*.json") if p.name != "environment.json")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("WARNING", "moestro.tuning"):
        warnings.simplefilter("always")
        entry.with_name("128.json").write_text("{")
        end = time.monotonic() + 120
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.01)
    assert [str(w.message) for w in caught] == []
    assert "128.json" in caplog.text


@pytest.mark.parametrize("value", [None, -1.5, True, [[]], {"a": 1}, "ü" * 300])
@pytest.mark.parametrize("name", ["reason", "fate", "runner", "samples", "probes", "median"])
@pytest.mark.filterwarnings("ignore::moestro.errors.StoreWarning", "ignore::moestro.errors.TuningWarning")
def test_a_candidate_with_an_absurd_field_ends_no_look_up_and_no_explanation(
    store: Path, name: str, value: Any
) -> None:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, {-1: 2e-3, 0: 1e-3}), config((64,))
    with tuner(clock, store).autotune(True) as t:
        t.choose_one("op", [runner], cfg, inputs(64))
    (entry,) = (p for p in store.rglob("*.json") if p.name != "environment.json")
    data = json.loads(entry.read_text())
    for candidate in data["record"]["evidence"]["candidates"]:
        candidate[name] = value
    entry.write_text(json.dumps(data))
    t = tuner(clock, store)
    assert t.choose_one("op", [runner], cfg, inputs(64))[1] in (-1, 0)
    assert t.explain("op", [runner], cfg, inputs(64))

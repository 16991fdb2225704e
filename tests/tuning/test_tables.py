"""Bundles as tables: smaller, read by a person, and the same decisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning import Store
from moestro.tuning.spec.evidence import SCHEMA
from moestro.tuning.store.bundle import convert, export_bundle, import_bundle, read_bundle

TIMES = {-1: 1e-3, 0: 1.2e-3, 1: lambda n: 5e-4 if n >= 32 else 2e-3, 2: ValueError("never")}


@pytest.fixture
def full(store: Path, tmp_path: Path) -> Path:
    """A bundle with all evidence: the default is kept below 32 rows."""
    clock = quiet_clock()
    t = tuner(clock, store)
    with t.autotune(True, crossover=False):
        t.choose_one("op", [Kernel(clock, TIMES)], config(), inputs(128))
    export_bundle(Store(store), tmp_path / "full.json")
    return tmp_path / "full.json"


def winners(path: Path) -> dict[Any, Any]:
    found = {}
    for entry in read_bundle(path).entries:
        if entry.kind == "decision":
            found[entry.record.bucket] = (entry.record.runner, entry.record.tactic, entry.record.status)
    return found


def test_a_bundle_has_each_key_tactic_and_policy_once_and_a_row_a_line(full: Path) -> None:
    data = json.loads(full.read_text())
    assert (len(data["keys"]), len(data["policies"])) == (1, 1)
    assert sorted(data["tactics"]) == [-1, 0, 1, 2]
    lines = full.read_text().splitlines()
    assert sum(line.startswith('["decision"') for line in lines) == 8
    assert all(
        len(json.dumps(n)) <= 9 for row in data["rows"] for n in row if isinstance(n, float) and n < 1e6
    )


def test_what_is_read_is_what_was_written_to_four_digits(full: Path, store: Path) -> None:
    stored = {entry.record.bucket: entry.record for entry in Store(store).entries()}
    for entry in read_bundle(full).entries:
        if entry.kind != "decision":
            continue
        record, was = entry.record, stored[entry.record.bucket]
        assert (record.runner, record.tactic, record.status, record.probes) == (
            was.runner,
            was.tactic,
            was.status,
            was.probes,
        )
        assert (record.complete, record.learned, record.tuned_for) == (
            was.complete,
            was.learned,
            was.tuned_for,
        )
        assert record.evidence.policy == was.evidence.policy
        for mine, theirs in zip(record.evidence.candidates, was.evidence.candidates, strict=True):
            assert (mine.runner, mine.tactic, mine.fate, mine.reason) == (
                theirs.runner,
                theirs.tactic,
                theirs.fate,
                theirs.reason,
            )
            if theirs.median is not None:
                assert mine.median == pytest.approx(theirs.median, rel=1e-3)


def test_a_slim_one_keeps_every_answer_and_no_evidence_for_the_default(full: Path, tmp_path: Path) -> None:
    slim = tmp_path / "slim.json"
    assert convert(full, slim, slim=True) == 8
    assert winners(slim) == winners(full)
    assert slim.stat().st_size < full.stat().st_size
    data = json.loads(slim.read_text())
    (kept,) = [row for row in data["rows"] if row[0] == "default"]
    buckets = dict(zip(data["columns"]["default"], kept[1:], strict=True))["buckets"]
    assert buckets == [[1], [2], [4], [8], [16]]
    other = Store(tmp_path / "other")
    assert import_bundle(slim, other)[0] >= 8
    clock = quiet_clock()
    runner, t = Kernel(clock, TIMES), tuner(clock, other)
    assert [t.choose_one("op", [runner], config(), inputs(n))[1] for n in (3, 16, 40, 128)] == [-1, -1, 1, 1]


def test_a_bundle_of_the_older_form_is_read_and_converted(full: Path, tmp_path: Path) -> None:
    now = read_bundle(full)
    entries = [{**e.data, "environment": e.environment, "key": 0} for e in now.entries]
    older = {
        "schema": SCHEMA, "kind": "bundle", "created": 1.0, "loose": [], "environments": dict(now.environments),
        "keys": [now.entries[0].key], "entries": entries,
    }  # fmt: skip
    path = tmp_path / "older.json"
    path.write_text(json.dumps(older))
    assert winners(path) == winners(full)
    convert(path, path)
    assert winners(path) == winners(full)
    assert json.loads(path.read_text())["schema"] == 2


@given(st.integers(0, 10_000), st.integers(1, 400), st.sampled_from(["cut", "digit", "name"]))
def test_a_damaged_bundle_is_read_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, length: int, what: str
) -> None:
    text = DAMAGED
    at %= len(text)
    if what == "cut":
        text = text[:at] + text[at + length :]
    elif what == "digit":
        text = text[:at] + "7" + text[at + 1 :]
    else:
        text = text.replace("decision", "precision", 1 + at % 2)
    path = tmp_path_factory.getbasetemp() / "damaged-bundle.json"
    path.write_text(text)
    try:
        entries = list(read_bundle(path).entries)
    except TuningError as error:
        entries, said = [], str(error)
        assert path.name in said
    assert {entry.kind for entry in entries} <= {"decision", "quarantine"}


def _damaged() -> str:
    row = ["decision", "e", 0, [8], 0, 0, 1, 2, [8], 0, 1, 5, 0.01, 4, 0.5, 3, 0, 3, {}]
    candidate = ["candidate", 0, 0, 4, 4, 1e-3, 1e-5, 1.0, 1.0, 1.0, 3, []]
    data = {
        "schema": 2, "kind": "bundle", "created": 1, "loose": [], "environments": {"e": {}},
        "keys": [{"op": "op", "runners": [{"class": "m.R", "config": {}}], "inputs": []}], "tactics": [-1],
        "policies": [{}], "texts": ["m.R", "measured", [], "", "winner"],
        "rows": [
            row, candidate, ["default", "e", 0, 0, 2, 3, 0, 5, [[1], [2]], []], ["quarantine", "e", 0, "m.R 3", "bad", 5]
        ],
    }  # fmt: skip
    return json.dumps(data)


DAMAGED = _damaged()


def test_the_undamaged_one_has_four_entries(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(DAMAGED)
    assert [entry.kind for entry in read_bundle(path).entries] == ["decision"] * 3 + ["quarantine"]

"""benchmarks/gpu_record.py: its plan names what there is, and its files hold what was measured whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moestro import formats
from moestro.bench import results
from moestro.bench.peers import peer_names
from moestro.routing import parse
from moestro.tuning.store import shipped
from moestro.tuning.store.bundle import read_bundle
from moestro.tuning.store.store import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_plan import PLAN  # noqa: E402
from recording import merged, shippable  # noqa: E402


def start(out: Path, only: str, seconds: int) -> subprocess.Popen[str]:
    """--each: long enough for a decision on a machine that does much else."""
    options = ["--device", "cpu", "--backend", "portable", "--tiny", "--each", "4", "--only", only]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_record.py",
        out,
        "--seconds",
        str(seconds),
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)


def test_the_plan_names_models_formats_peers_and_routings_that_there_are() -> None:
    assert len({step.name for step in PLAN}) == len(PLAN)
    assert [step.wave for step in PLAN] == sorted(step.wave for step in PLAN)
    for step in PLAN:
        assert step.shape.num_local_experts >= step.shape.top_k
        assert set(step.peers) <= set(peer_names("cuda"))
        assert all(formats.get(fmt) and taken in (None, "fp8") for fmt, taken in step.layers)
        assert all(parse(text).name for text in step.routings)
        assert list(step.tokens) == sorted(set(step.tokens))


def test_a_step_leaves_a_bundle_its_evidence_and_the_timings(tmp_path: Path) -> None:
    process = start(tmp_path, "qwen3-bf16", 120)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle.json",
        "log.txt",
        "record.json",
        "tuning.json",
    ]
    [found] = json.loads((tmp_path / "record.json").read_text())["results"].values()
    result = results.parse(found, tmp_path)
    assert not result.interrupted
    row = result.row("moestro bf16", 64)
    assert row is not None
    assert row.median_s > 0
    assert any(line.startswith("qwen3-bf16 uniform | moestro bf16 | ") for line in said.splitlines())
    decided = [e for e in read_bundle(tmp_path / "tuning.json").entries if e.kind == "decision"]
    assert decided
    assert len(read_bundle(tmp_path / "bundle.json").entries) == len(decided)


def test_what_was_measured_before_a_process_was_killed_is_in_its_files(tmp_path: Path) -> None:
    process = start(tmp_path, "qwen3-bf16,mixtral-bf16", 120)
    record, until = tmp_path / "record.json", time.monotonic() + 100
    while not record.exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [found] = json.loads(record.read_text())["results"].values()
    assert results.parse(found, record).tokens[0] == 1
    assert read_bundle(tmp_path / "bundle.json").entries


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_new_decision_takes_the_place_of_the_shipped_one_of_its_layer_and_size_alone(name: str) -> None:
    base = read_bundle(shipped.FOLDER / f"{name}.json").entries
    fresh = [replace(entry, environment="here") for entry in base if entry.kind == "decision"][:3]
    found = merged(base, fresh)
    assert len(found) == len(base)
    assert [entry.environment for entry in found[-3:]] == ["here"] * 3
    assert {entry.environment for entry in found[:-3]} == {base[0].environment}


def layer_of(name: str, *sizes: tuple[int, Any, bool]) -> list[Entry]:
    """Decisions of one layer: (size, tactic, whether its race was finished)."""
    key = {"op": "op", "runners": [{"class": name, "config": {}}], "inputs": [], "device": "cuda", "mode": "graph",
           "extras": [], "kwargs": {}}  # fmt: skip
    records = [{"bucket": [n], "tactic": tactic, "complete": whole} for n, tactic, whole in sizes]
    return [Entry(Path("x"), "here", "decision", "op", key, {"record": record}) for record in records]


def test_a_layer_ships_only_if_it_is_decided_from_one_token_on_and_no_unfinished_race_has_a_winner() -> None:
    whole = layer_of("whole", (1, -1, True), (64, "a", True), (4096, -1, False))
    begun = layer_of("begun", (256, "a", True), (16384, -1, True))
    unfinished = layer_of("unfinished", (1, -1, True), (64, "a", False), (4096, "a", True))
    assert shippable([*unfinished, *begun, *whole]) == whole


def test_every_shipped_layer_is_decided_from_one_token_on() -> None:
    for path in shipped.FOLDER.glob("*.json"):
        smallest: dict[str, int] = {}
        for entry in read_bundle(path).entries:
            if entry.kind == "decision":
                text, [size] = json.dumps(entry.key), entry.data["record"]["bucket"]
                smallest[text] = min(size, smallest.get(text, size))
        assert set(smallest.values()) == {1}, path

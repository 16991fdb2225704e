"""`moestro tune`: decisions in the store, Ctrl-C, budgets, and the miss log."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from cli_tools import QUICK, TINY, Run
from rich.console import Console

from moestro.bench.contenders import make_layer
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.models import from_sizes
from moestro.bench.tune import TuneResult, TuneRow
from moestro.cli.tables import tune_view
from moestro.errors import TuningWarning
from moestro.routing import Uniform
from moestro.tuning import AutoTuner, Store
from moestro.tuning.measure.campaign import Campaign

TUNE = ["tune", *TINY, "--store", "s"]


def test_decisions_are_in_the_store_and_bench_serves_them(run: Run) -> None:
    done = run(*TUNE, "--tokens", "1,4", "--routing", "zipf:1.0", "--json", "t.json")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("t.json").read_text())
    assert [(row["format"], row["tokens"], row["bucket"]) for row in data["rows"]] == [
        ("nvfp4", 1, 1),
        ("nvfp4", 4, 4),
    ]
    assert len(Store("s").entries()) >= 2
    served = run(
        "bench", *TINY, *QUICK, "--tokens", "4", "--store", "s", "--format", "nvfp4", "--json", "b.json"
    )
    assert served.exit_code == 0, served.output
    (ours,) = [row for row in json.loads(Path("b.json").read_text())["rows"] if row["ours"]]
    assert ours["facts"]["status"] in ("measured", "default")
    assert ours["facts"]["bucket"] == 4


def test_tuning_again_measures_nothing_again(run: Run) -> None:
    arguments = [*TUNE, "--tokens", "2", "--json", "t.json"]
    assert run(*arguments).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("s").rglob("*.json")}
    assert run(*arguments).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in Path("s").rglob("*.json")} == before


def test_formats_are_repeatable(run: Run) -> None:
    done = run(*TUNE, "--tokens", "1", "--format", "bf16", "--format", "nvfp4", "--json", "t.json")
    assert done.exit_code == 0, done.output
    assert [row["format"] for row in json.loads(Path("t.json").read_text())["rows"]] == ["bf16", "nvfp4"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Ctrl-C when the bucket of that size is begun."""
    real = Campaign._measure

    def interrupted(self, bucket, **kwargs):  # type: ignore[no-untyped-def]
        if bucket == (size,):
            raise KeyboardInterrupt
        return real(self, bucket, **kwargs)

    monkeypatch.setattr(Campaign, "_measure", interrupted)


def test_ctrl_c_keeps_finished_buckets(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2)
    done = run(*TUNE, "--tokens", "1,2,8", "--json", "t.json")
    assert done.exit_code == 130
    data = json.loads(Path("t.json").read_text())
    assert data["interrupted"] is True
    assert {1, 8} <= {row["tokens"] for row in data["rows"]}
    buckets = {entry.record.bucket for entry in Store("s").entries()}
    assert {(1,), (8,)} <= buckets
    assert (2,) not in buckets
    assert "2 decisions interrupted after" in done.output
    # whether one of the two serves 2 so far depends on what they decided, which a noisy machine may see either way
    by_another = [row["bucket"] for row in data["rows"] if row["tokens"] == 2]
    assert all(f"(that of N = {bucket})" in done.output for bucket in by_another), (by_another, done.output)
    what = "not measured themselves" if by_another else "not decided"
    assert f"{what}: nvfp4 N = 2; run again" in done.output


def test_a_budget_of_nothing_leaves_everything_open(run: Run) -> None:
    done = run(*TUNE, "--tokens", "1,2", "--budget", "0", "--json", "t.json")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("t.json").read_text())
    assert data["rows"] == []
    assert [entry["tokens"] for entry in data["open"]] == [1, 2]
    assert "not decided" in done.output


def miss(*sizes: int) -> None:
    """Serve these sizes from the store "s", which does not know them."""
    shape = from_sizes("8,2,64,32")
    layer = make_layer(LayerSource(shape), "nvfp4", "auto", 64, AutoTuner(store="s"))
    for size in sizes:
        case = make_case(shape, size, Uniform())
        with pytest.warns(TuningWarning), torch.inference_mode():
            layer(case.x, case.ids, case.weights)


def test_from_misses_works_off_the_miss_log(run: Run) -> None:
    assert run(*TUNE, "--tokens", "1,2").exit_code == 0
    miss(11)
    assert len(Store("s").entries(("miss",))) == 1
    done = run(*TUNE, "--from-misses", "--json", "t.json")
    assert done.exit_code == 0, done.output
    assert 11 in [row["tokens"] for row in json.loads(Path("t.json").read_text())["rows"]]
    assert Store("s").entries(("miss",)) == []
    assert (11,) in {entry.record.bucket for entry in Store("s").entries()}


def test_from_misses_of_an_empty_store_says_so(run: Run) -> None:
    done = run(*TUNE, "--from-misses")
    assert done.exit_code == 0
    assert "has no misses of this layer" in done.output


def test_a_backend_that_cannot_run_is_said_with_its_reason(run: Run) -> None:
    done = run(*TUNE, "--tokens", "1", "--backend", "triton")
    assert done.exit_code == 1
    assert "triton" in done.output
    assert "nothing could be tuned" in done.output


def test_a_miss_that_was_not_measured_stays_in_the_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TUNE, "--tokens", "1").exit_code == 0
    miss(5, 11)
    interrupt_at(monkeypatch, 5)
    assert run(*TUNE, "--from-misses").exit_code == 130
    assert (11,) in {entry.record.bucket for entry in Store("s").entries()}
    (left,) = Store("s").entries(("miss",))
    assert left.data["sizes"] == [5]


def test_a_race_that_the_budget_ended_is_said_to_be_unfinished() -> None:
    result = TuneResult(
        command="",
        date="",
        environment={"device_name": "a CPU"},
        problem={"name": "x", "num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32},
        conditions={},
        store="s",
        rows=[
            TuneRow("nvfp4", "auto", 4, 4, "cpu", "default", "measured", 1.0, 0.1, 4, 9, 1.0, complete=False)
        ],
    )
    text = io.StringIO()
    Console(width=200, file=text).print(tune_view(result))
    assert "unfinished: nvfp4 N = 4; run again to go on from here" in text.getvalue()
    assert "1 decision in" in text.getvalue()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["tune", "--sizes", "8,2,130,32"], "H = 130 of custom cannot be nvfp4"),
        (["tune", "--sizes", "8,2,64,48", "--format", "mxfp4"], "I = 48 of custom cannot be mxfp4"),
        (["bench", "--sizes", "8,2,72,32"], "H = 72 of custom cannot be nvfp4"),
        (["bench", "regret", "--sizes", "8,2,72,32"], "H = 72 of custom cannot be nvfp4"),
    ],
)
def test_sizes_that_a_format_cannot_block_are_wrong_usage(run: Run, command: list[str], said: str) -> None:
    done = run(*command, "--device", "cpu", "--tokens", "1")
    assert done.exit_code == 2
    assert said in done.output
    assert "--sizes" in done.output


def test_each_of_several_backends_is_named(run: Run) -> None:
    done = run(*TUNE, "--tokens", "1", "--backend", "portable", "--backend", "auto", "--budget", "0")
    assert "not decided: nvfp4 portable N = 1, nvfp4 auto N = 1" in done.output

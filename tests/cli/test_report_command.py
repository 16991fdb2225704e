"""`moestro report` and `moestro bench parity` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import QUICK, TINY, Run

from moestro.bench import parity, plots


def test_bench_leaves_a_report(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "1,4", "--report", "r.html", "--json", "o.json")
    assert done.exit_code == 0, done.output
    assert "<svg" in Path("r.html").read_text()
    again = run("report", "o.json", "--out", "again.html")
    assert again.exit_code == 0, again.output
    assert Path("again.html").read_text().count("<svg") == Path("r.html").read_text().count("<svg")


@pytest.mark.parametrize("command", [["report", "o.json"], ["bench", *TINY, "--report", "r.html"]])
def test_without_matplotlib_nothing_is_measured_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    run("bench", *TINY, *QUICK, "--tokens", "1", "--peers", "none", "--json", "o.json")
    monkeypatch.setattr(plots, "why_not", lambda: "plots need matplotlib: pip install 'moestro[report]'")
    monkeypatch.setattr("moestro.bench.run.run", None)
    done = run(*command)
    assert done.exit_code == 1
    assert "pip install 'moestro[report]'" in done.output


def test_a_missing_file_is_an_error_of_ours(run: Run) -> None:
    done = run("report", "nowhere.json")
    assert done.exit_code == 1
    assert "nowhere.json" in done.output


def test_report_of_nothing_is_wrong_usage(run: Run) -> None:
    assert run("report").exit_code == 2
    assert run("report", "--store", "no-such-folder").exit_code == 2


def test_parity_repeats_whole_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_bench", lambda arguments: run("bench", *arguments))
    options = [*TINY, *QUICK, "--tokens", "2", "--format", "bf16", "--peers", "eager"]
    done = run("bench", "parity", *options, "--runs", "2", "--ep", "1", "--ep", "2", "--json", "p.json")
    assert done.exit_code == 0, done.output
    assert "transformers eager" in done.output
    data = json.loads(Path("p.json").read_text())
    assert data["schema"] == "moestro.parity/1"
    assert [(d["ep"], d["tokens"], len(d["percent"])) for d in data["deltas"]] == [(1, 2, 2), (2, 2, 2)]
    for delta in data["deltas"]:
        assert delta["spread"] == pytest.approx(abs(delta["percent"][0] - delta["percent"][1]))


def test_parity_without_a_peer_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_bench", lambda arguments: run("bench", *arguments))
    done = run("bench", "parity", *TINY, *QUICK, "--tokens", "1", "--peers", "none", "--runs", "2")
    assert done.exit_code == 1
    assert "nothing to compare" in done.output

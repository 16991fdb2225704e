"""Parity: Δ% over whole runs, and runs that are processes of their own."""

from __future__ import annotations

import dataclasses

import pytest
from bench_plain import some_result

from moestro.bench import parity
from moestro.bench.results import BenchResult
from moestro.errors import MoestroError


def with_medians(result: BenchResult, ours: float, peer: float) -> BenchResult:
    rows = [dataclasses.replace(row, median_s=ours if row.ours else peer) for row in result.rows]
    return dataclasses.replace(result, rows=rows)


def test_delta_is_relative_to_the_peer_of_the_same_run() -> None:
    runs = [with_medians(some_result(), 0.9, 1.0), with_medians(some_result(), 2.2, 2.0)]
    found = parity.deltas(runs)
    assert [(d.ep, d.tokens, d.contender, d.peer) for d in found] == [
        (1, 1, "moestro nvfp4", "transformers eager"),
        (1, 4, "moestro nvfp4", "transformers eager"),
    ]
    for delta in found:
        assert delta.percent == pytest.approx((-10.0, 10.0))
        assert delta.mean == pytest.approx(0.0)
        assert delta.spread == pytest.approx(20.0)


@pytest.mark.parametrize("name", ["eager", "transformers", "transformers eager"])
def test_a_peer_can_be_named(name: str) -> None:
    assert len(parity.deltas([some_result()], name)) == 2


def test_a_peer_that_was_not_measured_gives_nothing() -> None:
    assert parity.deltas([some_result()], "grouped_mm") == []


def test_each_run_is_a_process_with_its_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def bench(arguments: list[str]) -> None:
        asked.append(list(arguments))
        if len(asked) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(parity, "_bench", bench)
    monkeypatch.setattr(parity.results, "read", lambda path: some_result())
    done = list(parity.repeat(["--sizes", "8,2,64,32"], runs=3, eps=[1, 2]))
    assert len(done) == 3  # what was whole when it was interrupted
    assert [arguments[arguments.index("--ep") + 1] for arguments in asked] == ["1", "2", "1", "2"]


def test_a_run_that_fails_says_what_it_said() -> None:
    with pytest.raises(MoestroError, match="'mixtral-8x7b'"):
        list(parity.repeat(["--model", "mixtral-8x7"], runs=2, eps=[1]))

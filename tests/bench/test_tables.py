"""Bench results on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from bench_plain import some_result
from rich.console import Console

from moestro.bench.results import BenchResult
from moestro.cli.tables import bench_view


def shown(result: BenchResult) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(bench_view(result))
    return captured.get()


def with_times(*seconds: float) -> BenchResult:
    """humming and Moestro at N = 1, then at N = 4."""
    base = some_result()
    rows = [
        replace(row, contender=row.contender if row.ours else "humming nvfp4", median_s=time)
        for row, time in zip(base.rows, seconds, strict=True)
    ]
    return replace(base, rows=rows)


def test_a_peer_that_is_not_transformers_is_headed_by_its_name() -> None:
    table = shown(with_times(4e-5, 2e-5, 2e-2, 1e-2)).partition("Peers:")[0]
    assert "humming" in table


def test_small_times_keep_their_digits_beside_large_ones() -> None:
    small = shown(with_times(3.974e-5, 2.104e-5, 2.404e-2, 1.802e-2))
    for digits in ("39.7", "21.0", "24040", "18020"):
        assert digits in small
    assert " ms" not in small
    large = shown(with_times(6e-3, 4e-3, 2.404e-1, 1.802e-1))
    assert "6.00" in large
    assert "nvfp4 ms" in large

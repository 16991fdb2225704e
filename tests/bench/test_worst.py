"""Several routings in one run: the worst ratio to each peer, and the file that holds all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench_plain import some_result

from moestro.bench import worst
from moestro.bench.results import BenchResult
from moestro.errors import MoestroError


def under(routing: str, slower: float) -> BenchResult:
    """The result of a routing under which ours takes so much longer."""
    result = some_result()
    rows = [dataclasses.replace(r, median_s=r.median_s * (slower if r.ours else 1)) for r in result.rows]
    return dataclasses.replace(result, rows=rows, conditions={**result.conditions, "routing": routing})


def test_the_worst_ratio_is_the_least_of_all_routings() -> None:
    found = [under("uniform", 1.0), under("zipf(1.0)", 2.5), under("trained", 1.25)]
    rows = worst.worst_ratios(found)
    assert [(row.tokens, row.contender, row.peer) for row in rows] == [
        (n, "moestro nvfp4", "transformers eager") for n in (1, 4)
    ]
    for row in rows:
        assert row.ratio == pytest.approx(0.8)
        assert row.routing == "zipf(1.0)"
        assert row.ratios == pytest.approx({"uniform": 2.0, "zipf(1.0)": 0.8, "trained": 1.6})


def test_a_peer_that_ran_under_one_routing_alone_counts() -> None:
    alone = under("zipf(1.0)", 1.0)
    alone = dataclasses.replace(alone, rows=[row for row in alone.rows if row.ours])
    (first, _) = worst.worst_ratios([under("uniform", 1.0), alone])
    assert first.ratios == pytest.approx({"uniform": 2.0})


def test_a_file_of_several_is_read_as_written_and_one_of_one_too(tmp_path: Path) -> None:
    from moestro.bench import results

    found = [under("uniform", 1.0), under("zipf(1.0)", 2.5)]
    worst.write(found, tmp_path / "several.json")
    assert worst.read(tmp_path / "several.json") == found
    results.write(found[0], tmp_path / "one.json")
    assert worst.read(tmp_path / "one.json") == found[:1]
    (tmp_path / "other.json").write_text('{"schema": "else"}')
    with pytest.raises(MoestroError, match=r"expected .*other\.json to hold schema"):
        worst.read(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MoestroError, match=r"cannot read .*broken\.json"):
        worst.read(tmp_path / "broken.json")

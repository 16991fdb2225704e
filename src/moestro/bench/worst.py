"""The worst of several routings: how far ahead of each peer Moestro is where it is least so.

One run of the bench per routing, with the same contenders (run.run_each); a ratio is a peer's median over ours in
the same case, so 2 is twice as fast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moestro.bench import results
from moestro.bench.results import BenchResult

__all__ = ["SCHEMA", "Worst", "read", "worst_ratios", "write"]

SCHEMA = "moestro.bench.routings/1"


@dataclass(frozen=True)
class Worst:
    """One contender of ours against one peer at one number of tokens."""

    tokens: int
    contender: str
    peer: str
    ratio: float  # the peer's time over ours where that is least
    routing: str  # where it is
    ratios: dict[str, float]  # of every routing


def worst_ratios(found: Sequence[BenchResult]) -> list[Worst]:
    """By number of tokens, contender and peer; what was measured under one routing alone counts as well."""
    ratios: dict[tuple[int, str, str], dict[str, float]] = {}
    for result in found:
        for ours in (row for row in result.rows if row.ours):
            for peer in (row for row in result.rows if not row.ours and row.tokens == ours.tokens):
                at = ratios.setdefault((ours.tokens, ours.contender, peer.contender), {})
                at[result.conditions["routing"]] = peer.median_s / ours.median_s
    rows = []
    for (tokens, contender, name), by_routing in sorted(ratios.items(), key=lambda item: item[0][0]):
        routing = min(by_routing, key=by_routing.__getitem__)
        rows.append(Worst(tokens, contender, name, by_routing[routing], routing, by_routing))
    return rows


def write(found: Sequence[BenchResult], path: Path) -> None:
    """All results and the worst ratios in one file, which `read` and `moestro report` take."""
    results.write_json(
        path,
        {
            "schema": SCHEMA,
            "results": [{"schema": results.SCHEMA, **asdict(result)} for result in found],
            "worst": [asdict(row) for row in worst_ratios(found)],
        },
    )


def read(path: Path) -> list[BenchResult]:
    """The results of a file of `write`'s, or the one of results.write's. Raises MoestroError for another file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return [results.read(path)]  # which says what is wrong
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        return [results.parse(one, path) for one in data.get("results", [])]
    return [results.read(path)]

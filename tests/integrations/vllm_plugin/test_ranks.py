"""Layers cut over ranks: one decision for all of them or none, and nobody waits for ever. Two gloo processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gloo_ranks import Ranks
from rank_cases import (
    left_alone,
    of_different_seconds,
    of_different_stores,
    tuned_together,
    with_an_empty_rank,
)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_ranks_whose_stores_differ_serve_one_set_of_decisions(two: Ranks, tmp_path: Path) -> None:
    (first, _), (second, lines) = two.run(of_different_stores, tmp_path)
    assert first == second
    assert all(one is not None for one in first)
    assert "decisions by tokens, of all ranks: 1: " in lines[-1]


def test_the_shortest_budget_of_all_ranks_counts(two: Ranks, tmp_path: Path) -> None:
    (first, took), (second, _) = two.run(of_different_seconds, tmp_path)
    assert first == second == [None, None, None]
    assert took < 100


def test_ranks_tune_together(two: Ranks, tmp_path: Path) -> None:
    first, second = two.run(tuned_together, tmp_path)
    assert first == second
    assert {one[1] for one in first if one is not None} == {"measured"}


def test_a_rank_without_experts_means_the_default_everywhere(two: Ranks, tmp_path: Path) -> None:
    for tactic, lines in two.run(with_an_empty_rank, tmp_path):
        assert tactic == -1
        assert any(
            "default tactic serves on all 2 ranks of a layer: ranks 1 have no experts" in t for t in lines
        )


def test_a_rank_that_left_the_layer_to_vllm_is_waited_for_once_and_nothing_but_the_default_serves(
    two: Ranks, tmp_path: Path
) -> None:
    tactics, lines, took = two.run(left_alone, tmp_path)[0]
    assert tactics == [-1, -1, -1]
    assert took < 100
    warnings = [text for text in lines if "default tactic serves" in text]
    assert len(warnings) == 1
    assert "rank 1 of 2 did not come" in warnings[0]
    assert "the default (the ranks did not agree)" in lines[-1]


def test_one_rank_has_nobody_to_ask(tmp_path: Path) -> None:
    from stand_ins import Config

    from moestro.integrations.vllm import ranks

    assert ranks.link(Config()) is None

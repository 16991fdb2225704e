"""Expert parallelism on gloo: outputs as from the one-rank layer, whatever the routing, the sizes, the placement."""

from __future__ import annotations

from pathlib import Path

import parallel_cases as cases
import pytest
from gloo_ranks import Ranks

ROUTINGS = ["uniform", "balanced", "zipf:1.2", "dirichlet:0.5", "one expert", "last rank only", "nowhere"]
COUNTS = {
    "even": [16, 16, 16, 16],
    "uneven": [7, 1, 40, 0],
    "none on the first rank": [0, 9, 3, 2],
    "none at all": [0, 0, 0, 0],
    "many": [1024, 301, 1000, 17],
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("counts", list(COUNTS))
def test_both_ways_give_what_one_rank_gives(ranks: Ranks, size: int, counts: str) -> None:
    routings = ROUTINGS if counts != "many" else ["zipf:1.2", "one expert"]
    for found in ranks.run(cases.equality, COUNTS[counts], routings, size=size):
        assert len(found) == 2 * len(routings)
        assert [case for case in found if not case[2] < cases.TIGHT] == []


REPLICAS = [[0, 1], [0, 1, 2, 3], [2], [3], [1, 3], [0], [1], [2]]


@pytest.mark.parametrize("placement", [[3, 2, 1, 0, 0, 1, 2, 3], REPLICAS])
def test_any_placement_gives_the_same(ranks: Ranks, placement: list[object]) -> None:
    def args(**more: object) -> list[list[tuple[str, str, float]]]:
        return ranks.run(
            cases.equality_with, COUNTS["uneven"], ROUTINGS, {"placement": placement, **more}, size=4
        )

    for found in args() + args(fmt="nvfp4"):
        assert [case for case in found if not case[2] < cases.TIGHT] == []


def test_a_rank_may_bring_its_shard_alone(ranks: Ranks) -> None:
    for found in ranks.run(cases.equality_with, COUNTS["uneven"], ROUTINGS, {"whole": False}, size=4):
        assert [case for case in found if not case[2] < cases.TIGHT] == []


def test_biases_stay_with_their_experts(ranks: Ranks) -> None:
    more = {"bias": True, "placement": REPLICAS}
    for found in ranks.run(cases.equality_with, COUNTS["uneven"], ["uniform"], more, size=4):
        assert [case for case in found if not case[2] < cases.TIGHT] == []


def test_fp8_rows_cost_their_rounding_and_no_more(ranks: Ranks) -> None:
    for found in ranks.run(cases.equality_with, COUNTS["even"], ["uniform"], {"payload": "fp8"}, size=2):
        errors = {way: error for way, _, error in found}
        assert errors["gather"] < cases.TIGHT
        assert 1e-3 < errors["dispatch"] < 0.05


def test_slots_of_gpus_without_symmetric_memory_give_the_same(ranks: Ranks) -> None:
    for placement in (None, REPLICAS):
        for exact, rounded in ranks.run(cases.slots_equality, COUNTS["uneven"], placement, size=4):
            assert exact < cases.TIGHT
            assert rounded < 0.05


def test_a_bound_saves_the_exchange_of_sizes(ranks: Ranks) -> None:
    assert max(ranks.run(cases.same_bound_without_exchange, size=2)) < cases.TIGHT


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("bound", ["bound must be at least this rank's 20 tokens", "got 8"]),
        ("top_k", ["top_k must be the same on all ranks", "{0: 3, 1: 4}"]),
        ("gap", ["without [3, 7]"]),
        ("way", ["unknown way 'gathr'", "'gather'"]),
        ("placement", ["every rank must hold at least one expert, got [8, 0] slots"]),
    ],
)
def test_what_does_not_fit_is_an_error_on_every_rank_that_names_it(
    ranks: Ranks, case: str, said: list[str]
) -> None:
    for text in ranks.run(cases.message, case, size=2):
        for part in said:
            assert part in text


def test_a_call_that_one_rank_refuses_ends_on_all(ranks: Ranks) -> None:
    other, refusing = ranks.run(cases.message, "one rank", size=2)
    assert "max_num_tokens=16 tokens, got 17" in refusing
    assert "GroupError: rank 1 refused its call" in other


def test_tuning_gives_all_ranks_the_same_ways_and_tactics_and_keeps_them(
    ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks.run(cases.tuned, str(tmp_path), size=2)
    assert first[:3] == second[:3]
    ways, again, decided, wrong = first
    assert set(ways) <= {"gather", "dispatch"}
    assert again == ways
    assert all(decided)
    assert wrong < cases.TIGHT


def test_ways_serve_only_where_all_ranks_have_the_same(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(cases.differing_ways, str(tmp_path), size=2) == [["gather"], ["gather"]]


@pytest.mark.parametrize("strategy", ["parallel", "broadcast", "merge"])
def test_layers_of_different_experts_tune_to_one_decision(ranks: Ranks, strategy: str) -> None:
    first, second = ranks.run(cases.layer_tune, strategy, size=2)
    assert first == second
    assert None not in first


def test_calls_with_different_sizes_in_one_context_come_to_one_decision(ranks: Ranks) -> None:
    first, second = ranks.run(cases.autotune_in_step, size=2)
    assert first == second
    assert None not in first

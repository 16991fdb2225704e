"""Placements: what they hold, and that balancing by load never does worse than contiguous shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moestro
from moestro.errors import RoutingError
from moestro.parallel import Placement, place
from moestro.parallel.ways import Routes


def test_contiguous_shards_differ_by_one_at_most() -> None:
    placement = Placement.contiguous(10, 4)
    assert [placement.slots(rank) for rank in range(4)] == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    assert [placement.start(rank) for rank in range(4)] == [0, 3, 6, 8]


def test_a_map_is_a_rank_or_ranks_for_each_expert() -> None:
    placement = Placement.of([1, [0, 1], 0], 3, 2)
    assert Placement.of({0: 1, 2: [0], 1: (1, 0)}, 3, 2) == placement
    assert Placement.of(torch.tensor([1, 0, 0]), 3, 2)[1] == (0,)
    assert list(placement) == [(1,), (0, 1), (0,)]
    assert placement.slots(0) == (1, 2)
    assert placement.slots(1) == (0, 1)
    assert placement.replicas == 1
    assert placement.start(0) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([0, 2], "0..1"),
        ([[], 0], r"placement\[0\]"),
        ([0], "2 experts on 2 ranks"),
        ([[1, 1], 0], "different ranks"),
        ({0: 1, 2: 0}, r"experts 0\.\.1, got \[0, 2\]"),
    ],
)
def test_maps_that_cannot_be_are_named(value: list[object], said: str) -> None:
    with pytest.raises(RoutingError, match=said):
        Placement.of(value, 2, 2)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_expert_is_placed_with_as_many_copies_as_asked_and_shares_are_even(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 6))
    experts = data.draw(st.integers(ranks, 40))
    loads = data.draw(st.lists(st.floats(0, 1000), min_size=experts, max_size=experts))
    replicas = data.draw(st.integers(0, min(20, experts * (ranks - 1))))
    placement = place(loads, ranks, replicas)
    assert placement.replicas == replicas
    slots = [len(placement.slots(rank)) for rank in range(ranks)]
    assert sum(slots) == experts + replicas
    assert max(slots) - min(slots) <= 2
    assert placement.imbalance() >= 1 - 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 1.5]))
def test_balancing_is_no_worse_than_contiguous_and_replicas_help(seed: int, alpha: float) -> None:
    ids = moestro.routing.Zipf(alpha).sample(2048, 64, 8, seed=seed)
    loads = ids.flatten().bincount(minlength=64)
    before = Placement.contiguous(64, 8).imbalance(loads.tolist())
    balanced, replicated = place(loads, 8), place(loads, 8, replicas=8)
    assert balanced.imbalance() <= before + 1e-9
    assert replicated.imbalance() <= balanced.imbalance() * 1.02
    assert replicated.imbalance() < 1.1


def test_a_placement_says_what_it_gains() -> None:
    text = str(place([8.0, 1.0, 1.0, 2.0], 2, replicas=2))
    assert "2 replicas" in text
    assert "1.50 with contiguous shards" in text


def test_loads_may_be_a_tensor_of_layers() -> None:
    layers = torch.tensor([[4, 0, 1, 1], [4, 0, 1, 1]])
    assert place(layers, 2).loads == (8.0, 0.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0, -1.0], 1), "loads must be"),
        (([1.0, 1.0], 3), r"ranks must be in 1\.\.2"),
        (([1.0, 1.0], 2, 3), r"replicas must be in 0\.\.2, got 3"),
        (([float("nan")], 1), "finite"),
    ],
)
def test_what_cannot_be_placed_is_named(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(RoutingError, match=said):
        place(*arguments)  # type: ignore[arg-type]


def test_replicas_share_an_experts_tokens_evenly_and_every_rank_agrees_where_they_go() -> None:
    placement = Placement.of([[0, 1], [0, 1, 2], 2], 3, 3)
    routes = [Routes(placement, rank, torch.device("cpu")) for rank in range(3)]
    ids = torch.tensor([[0, 1]] * 60, dtype=torch.int32)
    chosen = [r.ranks(r.known(ids), first=1) for r in routes]
    assert all(torch.equal(one, chosen[0]) for one in chosen)
    assert chosen[0][:, 0].bincount().tolist() == [30, 30]
    assert chosen[0][:, 1].bincount().tolist() == [20, 20, 20]


def test_ids_that_are_no_experts_go_nowhere() -> None:
    routes = Routes(Placement.contiguous(4, 2), 0, torch.device("cpu"))
    known = routes.known(torch.tensor([[-1, 4, 99, 2]], dtype=torch.int32))
    assert routes.ranks(known).tolist() == [[-1, -1, -1, 1]]
    assert routes.ids_of(known, routes.ranks(known), 1).tolist() == [[-1, -1, -1, 2]]

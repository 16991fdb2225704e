"""Routing distributions: what they promise of every sample, their loads, recordings, and their names."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moestro.errors as errors
from moestro.routing import (
    Balanced,
    Correlated,
    Dirichlet,
    Distribution,
    Recorded,
    Uniform,
    Zipf,
    distributions,
    parse,
    record,
    sample_weights,
)

SKEWED = [Zipf(0.0), Zipf(1.2), Zipf(30.0), Dirichlet(0.51), Dirichlet(0.9), Dirichlet(1.0)]
CORRELATED = [Correlated(0.0), Correlated(0.7), Correlated(1.0)]
ALL = [Balanced(), Uniform(), *SKEWED, *CORRELATED]


def loads(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(ids.flatten(), minlength=num_experts)


@given(st.sampled_from(ALL), st.integers(0, 70), st.integers(2, 40), st.data())
@settings(max_examples=80)
def test_samples_are_distinct_in_range_and_the_same_for_a_seed(
    distribution: Distribution, num_tokens: int, num_experts: int, data: Any
) -> None:
    top_k, seed = data.draw(st.integers(1, num_experts)), data.draw(st.integers(0, 2**40))
    ids = distribution.sample(num_tokens, num_experts, top_k, seed=seed)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.int32, (num_tokens, top_k), "cpu")
    assert all(len(set(row)) == top_k and set(row) <= set(range(num_experts)) for row in ids.tolist())
    assert torch.equal(ids, distribution.sample(num_tokens, num_experts, top_k, seed=seed))


@pytest.mark.parametrize("distribution", ALL)
def test_seeds_differ(distribution: Distribution) -> None:
    assert not torch.equal(distribution.sample(64, 16, 4, seed=0), distribution.sample(64, 16, 4, seed=1))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 8, 8), (7, 5, 3), (128, 64, 6), (33, 1, 1)]
)
def test_balanced_loads_differ_by_at_most_one(num_tokens: int, num_experts: int, top_k: int) -> None:
    load = loads(Balanced().sample(num_tokens, num_experts, top_k), num_experts)
    assert load.max() - load.min() <= 1


def test_uniform_loads_are_those_of_independent_draws() -> None:
    """Each load is binomial with variance N·q·(1 - q), q = K/E: chi-square over E within five deviations."""
    num_tokens, num_experts, top_k = 20_000, 64, 4
    load = loads(Uniform().sample(num_tokens, num_experts, top_k), num_experts).double()
    q = top_k / num_experts
    chi2 = ((load - num_tokens * q) ** 2).sum() / (num_tokens * q * (1 - q))
    assert abs(chi2 - (num_experts - 1)) < 5 * (2 * num_experts) ** 0.5


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.8, 1.0])
def test_a_token_shares_this_part_of_its_experts_with_the_one_before(overlap: float) -> None:
    """Beside what chance alone gives: of those drawn anew, K/E or a little less are shared as well."""
    num_tokens, num_experts, top_k = 4000, 256, 8
    rows = Correlated(overlap).sample(num_tokens, num_experts, top_k).tolist()
    shared = [len({*a} & {*b}) / top_k for a, b in itertools.pairwise(rows)]
    assert sum(shared) / len(shared) == pytest.approx(
        overlap + (1 - overlap) * top_k / num_experts, abs=0.015
    )


def test_all_experts_are_equally_likely_under_correlated_routing() -> None:
    load = loads(torch.cat([Correlated(0.5).sample(64, 16, 4, seed=s) for s in range(200)]), 16)
    assert load.min() > 0.9 * load.float().mean()


def test_first_draws_follow_the_popularities_and_the_hot_expert_is_the_seeds() -> None:
    num_tokens, num_experts = 50_000, 16
    shares = (
        loads(Zipf(1.0).sample(num_tokens, num_experts, 1), num_experts).sort(descending=True).values
        / num_tokens
    )
    rank = torch.arange(1, num_experts + 1)
    torch.testing.assert_close(shares, (1 / rank) / (1 / rank).sum(), rtol=0.1, atol=0)
    hot = {int(loads(Zipf(1.0).sample(200, num_experts, 1, seed=s), num_experts).argmax()) for s in range(12)}
    assert len(hot) > 4


def test_draws_without_replacement_are_proportional_among_what_is_left() -> None:
    """P(1st = a, 2nd = b) = p_a · p_b / (1 - p_a), for the popularities 1, 1/2, 1/3 of Zipf(1)."""
    ids = Zipf(1.0).sample(60_000, 3, 2)
    order = loads(ids[:, :1], 3).argsort(descending=True).tolist()
    p = {expert: 6 / 11 / rank for rank, expert in enumerate(order, start=1)}
    for a, b in [(x, y) for x in range(3) for y in range(3) if x != y]:
        seen = ((ids[:, 0] == a) & (ids[:, 1] == b)).double().mean().item()
        assert seen == pytest.approx(p[a] * p[b] / (1 - p[a]), abs=0.01)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_dirichlet_has_about_its_fraction_of_effective_experts(fraction: float) -> None:
    num_experts = 256
    concentrations = []
    for seed in range(200):
        log_p = Dirichlet(fraction).log_popularity(num_experts, np.random.default_rng(seed))
        p = np.exp(log_p - log_p.max())
        concentrations.append(((p / p.sum()) ** 2).sum())
    assert 1 / np.mean(concentrations) == pytest.approx(fraction * num_experts, rel=0.1)


def test_a_tiny_concentration_does_not_underflow() -> None:
    ids = Dirichlet(1.001 / 8).sample(100, 8, 3)
    assert loads(ids, 8).max() == 100


@pytest.mark.parametrize("distribution", [Uniform(), Zipf(1.0), Dirichlet(0.5), Correlated(0.5)])
def test_a_smaller_sample_is_the_start_of_a_larger_one(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = distribution.sample(100, 32, 4, seed=7)
    monkeypatch.setattr(distributions, "CHUNK", 3 * 32)
    assert torch.equal(large[:41], distribution.sample(41, 32, 4, seed=7))


def test_samples_are_the_same_on_every_machine() -> None:
    """Recorded decisions name a distribution and a seed: these values must never change."""
    assert Balanced().sample(2, 8, 3, seed=1).tolist() == [[4, 2, 6], [5, 0, 1]]
    assert Zipf(1.0).sample(2, 8, 3, seed=1).tolist() == [[7, 1, 4], [0, 1, 2]]
    assert Dirichlet(0.5).sample(2, 8, 3, seed=1).tolist() == [[7, 6, 0], [3, 1, 7]]


def test_weights_are_normalised_and_descend() -> None:
    weights = sample_weights(50, 6, seed=3)
    assert (weights.dtype, weights.shape) == (torch.float32, (50, 6))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert (weights[:, :-1] >= weights[:, 1:]).all()
    assert (weights > 0).all()
    assert torch.equal(weights, sample_weights(50, 6, seed=3))
    assert sample_weights(0, 6).shape == (0, 6)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_a_recording_comes_back_as_it_was_and_wraps_around(tmp_path: Path, suffix: str) -> None:
    ids = Uniform().sample(10, 16, 4, seed=5)
    path = tmp_path / f"ids{suffix}"
    record(path, ids.long(), num_experts=16)
    recorded = Recorded(path)
    assert torch.equal(ids, recorded.sample(10, 16, 4))
    assert torch.equal(ids[torch.arange(23) % 10], recorded.sample(23, 16, 4))
    assert torch.equal(ids[:3], recorded.sample(3, 16, 4))
    assert recorded.sample(3, 16, 4).dtype == torch.int32
    starts = {tuple(recorded.sample(1, 16, 4, seed=s)[0].tolist()) for s in range(30)}
    assert starts <= {tuple(row) for row in ids.tolist()}
    assert len(starts) > 3
    assert recorded.sample(0, 16, 4).shape == (0, 4)
    with pytest.raises(errors.RoutingError, match=r"top_k must be 4, as recorded in .*, got 3"):
        recorded.sample(3, 16, 3)
    with pytest.raises(errors.RoutingError, match=r"num_experts must be .*, got 8"):
        recorded.sample(3, 8, 4)
    if suffix == ".npy":  # has no room for the number of experts: more may have been there than were hit
        assert recorded.sample(3, 32, 4).shape == (3, 4)
    else:
        with pytest.raises(errors.RoutingError, match=r"num_experts must be 16, as recorded .*, got 32"):
            recorded.sample(3, 32, 4)


def test_a_recording_is_named_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    record(path, torch.tensor([[0, 1]]))
    first = Recorded(path).name
    assert first.startswith("recorded(ids.npy@")
    record(path, torch.tensor([[1, 0]]))
    assert Recorded(path).name != first


def test_a_plain_tensor_file_is_read(tmp_path: Path) -> None:
    torch.save(torch.tensor([[2, 0], [1, 2]]), tmp_path / "ids.pt")
    assert Recorded(str(tmp_path / "ids.pt")).sample(2, 3, 2).tolist() == [[2, 0], [1, 2]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0.0, 1.0]]), "integer ids"),
        (torch.tensor([0, 1]), "integer ids"),
        (torch.tensor([[0, 3], [2, 2]]), r"distinct experts per token, got \[2, 2\] in row 1"),
        (torch.tensor([[0, -1]]), "ids at least 0, got ids from -1 to 0"),
        (torch.empty(3, 0, dtype=torch.int32), "at least one expert"),
    ],
)
def test_what_is_not_routing_is_neither_recorded_nor_read(
    ids: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.RoutingError, match=message):
        record(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "ids.npy", ids.numpy())
    with pytest.raises(errors.RoutingError, match=message):
        Recorded(tmp_path / "ids.npy").sample(1, 8, 2)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.RoutingError, match=r"ids in \[0, 4\), got ids from 0 to 4"):
        record(tmp_path / "ids.pt", torch.tensor([[0, 4]]), num_experts=4)
    with pytest.raises(errors.RoutingError, match="no file"):
        Recorded(tmp_path / "missing.npy").sample(1, 8, 2)
    with pytest.raises(errors.RoutingError, match=r"missing\.npy"):
        _ = Recorded(tmp_path / "missing.npy").name
    with pytest.raises(errors.RoutingError, match=r"must end in \.npy, \.pt, \.safetensors"):
        Recorded(tmp_path / "ids.csv").sample(1, 8, 2)
    for name in ("bad.npy", "bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(errors.RoutingError, match=f"reading .*{name} failed"):
            Recorded(tmp_path / name).sample(1, 8, 2)
    record(tmp_path / "none.npy", torch.empty(0, 2, dtype=torch.int32))
    with pytest.raises(errors.RoutingError, match="holds no token"):
        Recorded(tmp_path / "none.npy").sample(1, 8, 2)


@pytest.mark.parametrize("distribution", ALL)
def test_names_are_read_back(distribution: Distribution) -> None:
    assert parse(distribution.name) == distribution
    assert isinstance(distribution, Distribution)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("balanced", Balanced()),
        ("Uniform", Uniform()),
        ("zipf", Zipf(1.0)),
        ("zipf:1.2", Zipf(1.2)),
        ("dirichlet:0.25", Dirichlet(0.25)),
        ("correlated:0.75", Correlated(0.75)),
        ("correlated", Correlated(0.5)),
        ("recorded:/a b/c:d.npy", Recorded("/a b/c:d.npy")),
    ],
)
def test_words_of_the_command_line(text: str, expected: Distribution) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zpif", "unknown routing distribution 'zpif'; did you mean 'zipf'"),
        ("", "unknown routing distribution ''"),
        ("zipf:", "unknown routing distribution"),
        ("zipf:hot", "alpha of zipf must be a number, got 'hot'"),
        ("zipf:-1", "alpha of Zipf must be finite and at least 0, got -1"),
        ("zipf:nan", "finite"),
        ("dirichlet:0", r"in \(0, 1\], got 0"),
        ("dirichlet:1.5", r"in \(0, 1\], got 1.5"),
        ("correlated:1.5", r"overlap of Correlated must be in \[0, 1\], got 1.5"),
        ("balanced:3", "balanced takes no argument, got '3'"),
        ("recorded", "recorded needs its file"),
    ],
)
def test_words_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(errors.RoutingError, match=message):
        parse(text)


@pytest.mark.parametrize("distribution", [*ALL, Recorded("unread.npy")])
def test_impossible_samples_are_refused(distribution: Distribution) -> None:
    with pytest.raises(errors.RoutingError, match="top_k must be from 1 to the number of experts, 4, got 5"):
        distribution.sample(3, 4, 5)
    with pytest.raises(errors.RoutingError, match="got 0"):
        distribution.sample(3, 4, 0)
    with pytest.raises(errors.RoutingError, match="num_tokens must be at least 0, got -1"):
        distribution.sample(-1, 4, 2)


def test_dirichlet_refuses_less_than_one_effective_expert() -> None:
    with pytest.raises(errors.RoutingError, match="above 1 expert"):
        Dirichlet(0.1).sample(3, 8, 2)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True, "1"])
@pytest.mark.parametrize(
    "distribution", [Balanced(), Uniform(), Zipf(), Dirichlet(), Correlated()], ids=lambda d: d.name
)
def test_a_seed_that_is_no_number_is_refused(distribution: Any, seed: Any) -> None:
    with pytest.raises(errors.RoutingError, match="seed must be"):
        distribution.sample(3, 8, 2, seed=seed)


@pytest.mark.parametrize("value", ["1", None, True])
@pytest.mark.parametrize("kind", [Zipf, Dirichlet, Correlated])
def test_a_parameter_that_is_no_number_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(errors.RoutingError, match=f"of {kind.__name__} must be"):
        kind(value)

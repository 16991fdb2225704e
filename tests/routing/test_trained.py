"""The routing of a trained model: as recorded where the layer fits, its profile for any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import RoutingError
from moestro.routing import Recorded, Trained, Uniform, Zipf, parse
from moestro.routing.recorded import read
from moestro.routing.trained import RECORDINGS, inclusion, profile_of, resampled

(SHIPPED,) = sorted(RECORDINGS.glob("*.npy"))
E, K = 32, 4


def shares(ids: torch.Tensor, num_experts: int) -> Any:
    counts = torch.bincount(ids.flatten(), minlength=num_experts).double()
    return (counts / counts.sum()).sort(descending=True).values.numpy()


def test_the_recording_that_ships_is_small_and_really_routed() -> None:
    ids, _, _ = read(SHIPPED)
    assert SHIPPED.name.startswith(f"e{E}-k{K}-")
    assert SHIPPED.stat().st_size < 200_000
    assert ids.shape[1:] == (4, K)
    for layer in ids.unbind(1):
        share = shares(layer, E)
        effective = 1 / float(np.square(share).sum()) / E
        assert 0.3 < effective < 0.97, "neither collapsed nor uniform"
        assert (share > 0).sum() > E // 2, "no layer uses a few experts alone"


def test_neighbouring_tokens_of_the_recording_share_experts_as_those_of_no_synthetic_batch_do() -> None:
    def kept(ids: torch.Tensor) -> float:
        return float((ids[1:, :, None] == ids[:-1, None, :]).any(-1).double().mean())

    layer = read(SHIPPED)[0][:, 1]
    shuffled = layer[torch.randperm(len(layer), generator=torch.Generator().manual_seed(0))]
    assert kept(layer) > 1.02 * kept(shuffled)
    assert kept(layer) > 1.2 * kept(Uniform().sample(len(layer), E, K))


def test_a_layer_of_the_same_sizes_gets_the_recorded_tokens_of_one_layer() -> None:
    ids = read(SHIPPED)[0]
    trained = Trained()
    assert torch.equal(trained.sample(100, E, K), ids[:100, 0].int())
    for seed in (1, 2, 6):
        want = Recorded(SHIPPED, layer=seed % 4).sample(50, E, K, seed=seed)
        assert torch.equal(trained.sample(50, E, K, seed=seed), want)


@given(st.integers(0, 70), st.integers(1, 70), st.data())
@settings(max_examples=60, deadline=None)
def test_samples_are_distinct_in_range_and_the_same_for_a_seed(
    num_tokens: int, num_experts: int, data: Any
) -> None:
    top_k, seed = data.draw(st.integers(1, num_experts)), data.draw(st.integers(0, 2**40))
    ids = Trained().sample(num_tokens, num_experts, top_k, seed=seed)
    assert (ids.dtype, ids.shape) == (torch.int32, (num_tokens, top_k))
    assert all(len(set(row)) == top_k and set(row) <= set(range(num_experts)) for row in ids.tolist())
    assert torch.equal(ids, Trained().sample(num_tokens, num_experts, top_k, seed=seed))


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (256, 8), (64, 6), (8, 2), (16, 1)])
def test_other_layers_get_the_same_shares_by_rank(num_experts: int, top_k: int) -> None:
    profile = profile_of(read(SHIPPED)[0], E)
    want = resampled(profile, num_experts)
    got = shares(Trained().sample(8192, num_experts, top_k, seed=3), num_experts)
    assert np.abs(got - want).sum() < 0.08
    assert got[0] * num_experts > 1.2, "not uniform"


@given(
    st.lists(st.floats(0.001, 10), min_size=1, max_size=40),
    st.integers(1, 100),
)
def test_resampled_shares_sum_to_one_and_keep_the_cumulative_share(raw: list[float], experts: int) -> None:
    profile = np.sort(np.array(raw))[::-1] / sum(raw)
    made = resampled(profile, experts)
    assert made.sum() == pytest.approx(1)
    assert (np.diff(made) <= 1e-12).all()
    if experts % len(profile) == 0:
        together = made.reshape(len(profile), -1).sum(1)
        np.testing.assert_allclose(together, profile, atol=1e-12)
    np.testing.assert_allclose(resampled(profile, len(profile)), profile, atol=1e-12)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=40).filter(lambda raw: sum(raw) > 0), st.data())
def test_inclusion_is_a_probability_and_sums_to_top_k(raw: list[float], data: Any) -> None:
    top_k = data.draw(st.integers(1, len(raw) - 1))
    chosen = inclusion(np.array(raw) / sum(raw), top_k)
    assert ((chosen > 0) & (chosen <= 0.95)).all()
    if top_k <= 0.9 * len(raw):
        assert chosen.sum() == pytest.approx(top_k, rel=0.02)


def test_a_recording_of_ones_own_is_taken_by_its_name(tmp_path: Path) -> None:
    ids = torch.stack([Zipf(1.0).sample(600, 12, 3, seed=s) for s in (0, 1)], dim=1)
    path = tmp_path / "e12-k3-mine.npy"
    np.save(path, ids.numpy())
    mine = Trained(path)
    assert torch.equal(mine.sample(5, 12, 3), ids[:5, 0])
    assert mine.name.startswith("trained(e12-k3-mine@")
    assert mine.sample(64, 40, 4).max() < 40
    other = tmp_path / "routing.npy"
    np.save(other, ids.numpy())
    with pytest.raises(RoutingError, match=r"named e<E>-k<K>-<name>\.npy, got .*routing\.npy"):
        Trained(other).sample(1, 12, 3)


def test_the_command_line_knows_it() -> None:
    assert parse("trained") == Trained()
    assert Trained().name == f"trained({SHIPPED.stem}@{Recorded(SHIPPED)._digest})"
    with pytest.raises(RoutingError, match="trained takes no argument"):
        parse("trained:x")

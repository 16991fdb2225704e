"""Location, scale and bound of log-ratios, against what they promise. Fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.tuning.race.statistics import Gaps, gaps, half_width


def table(seed: int, rounds: int, outliers: float = 0.01, twice: bool = True) -> np.ndarray:
    """Log-ratios of a candidate to an equal reference, which ran twice in each round: [rounds, 2, 1, 1]."""
    random = np.random.default_rng(seed)
    runs = 0.02 * random.standard_normal((rounds, 3))
    runs[random.random(runs.shape) < outliers] += np.log(3)
    candidate, first, second = runs.T
    return np.stack([candidate - first, candidate - (second if twice else first)], axis=1)[:, :, None, None]


def test_a_reference_that_ran_twice_does_not_look_slower_for_its_outliers() -> None:
    found = [gaps(table(seed, 200, outliers=0.05)).location[0, 0] for seed in range(300)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error < 5e-4


@pytest.mark.parametrize("rounds", [5, 20, 100])
def test_the_scale_predicts_the_spread_of_the_location(rounds: int) -> None:
    found = [gaps(table(seed, rounds)) for seed in range(400)]
    spread = np.std([g.location[0, 0] for g in found])
    predicted = np.sqrt(np.mean([g.standard_error[0, 0] ** 2 for g in found]))
    assert 0.95 < predicted / spread < 1 + 4 / rounds  # few rounds of a single pair: on the safe side


def test_outliers_of_any_size_move_the_location_by_little() -> None:
    clean = table(1, 30, outliers=0.0)
    dirty = clean.copy()
    dirty[[3, 17]] += 1e6
    assert abs(gaps(dirty).location - gaps(clean).location)[0, 0] < 0.01


@given(st.integers(2, 40), st.integers(0, 1000), st.floats(-5, 5), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_the_data_shifts_the_location_and_keeps_the_scale(
    rounds: int, seed: int, shift: float, factor: float
) -> None:
    data = table(seed, rounds) * factor
    found, shifted = gaps(data), gaps(data + shift)
    np.testing.assert_allclose(shifted.location, found.location + shift, atol=1e-9 * factor)
    np.testing.assert_allclose(shifted.scale, found.scale, rtol=1e-6)


def test_without_noise_the_scale_is_the_floor_of_clocks() -> None:
    found = gaps(np.full((3, 2, 4, 2), 0.25))
    np.testing.assert_allclose(found.location, 0.25)
    assert 0 < found.scale.max() < 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_bound_holds_at_every_look_at_once(alpha: float) -> None:
    """Normal noise, 400 looks: the true mean stays above the bound in 1 - alpha of all races."""
    random = np.random.default_rng(7)
    sums = np.cumsum(0.025 * random.standard_normal((3000, 400)), axis=1)
    broken = np.zeros(len(sums), dtype=bool)
    for n in range(1, 401):
        gap = Gaps(sums[:, [n - 1]] / n, np.full((len(sums), 1), 0.025), n)
        broken |= (gap.location - half_width(gap, alpha, 0.005) > 0)[:, 0]
    assert broken.mean() <= alpha
    assert broken.mean() >= alpha / 20  # and is not idle


def test_the_bound_narrows_with_rounds_and_widens_with_certainty() -> None:
    def width(rounds: int, alpha: float) -> float:
        return float(half_width(Gaps(np.zeros((1, 1)), np.full((1, 1), 0.02), rounds), alpha, 0.005)[0, 0])

    assert width(10, 0.05) > width(20, 0.05) > width(400, 0.05) > 0.0025
    assert width(20, 0.001) > width(20, 0.05)

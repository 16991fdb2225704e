"""Bucket generators and maps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import TuningError
from moestro.tuning import (
    get_hybrid_num_tokens_buckets,
    last_positive_power_of_2,
    make_bucket_mapper,
    make_tile_aware_buckets,
    map_to_hybrid_bucket,
    map_to_hybrid_bucket_uncapped,
    next_positive_power_of_2,
    round_to_nearest_bucket,
)

sizes = st.integers(1, 200_000)
bucket_sets = st.lists(st.integers(1, 5000), min_size=1, max_size=20)


def test_the_hybrid_scheme_is_dense_where_tiles_change() -> None:
    powers = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    every_256 = (512, 768, 1024, 1280, 1536, 1792, 2048)
    every_512 = (2560, 3072, 3584, 4096)
    beyond = (8192, 16384, 32768)
    assert get_hybrid_num_tokens_buckets(32768) == powers + every_256 + every_512 + beyond


@pytest.mark.parametrize("n", [1, 3, 255, 257, 1000, 3000, 5000, 8192, 16384, 20000, 65536])
def test_the_generator_ends_with_the_size_that_was_asked_for(n: int) -> None:
    buckets = get_hybrid_num_tokens_buckets(n)
    assert buckets[-1] == n
    assert list(buckets) == sorted(set(buckets))


@given(sizes)
def test_the_generator_contains_every_power_of_two(n: int) -> None:
    powers = {1 << k for k in range(20) if 1 << k <= n}
    assert powers <= set(get_hybrid_num_tokens_buckets(n))


def test_a_minimum_leaves_smaller_buckets_out() -> None:
    assert get_hybrid_num_tokens_buckets(1024, 300) == (512, 768, 1024)


@pytest.mark.parametrize("n", [16384, 32768, 65536])
def test_the_uncapped_map_has_no_largest_bucket(n: int) -> None:
    assert map_to_hybrid_bucket_uncapped(n) == n
    assert map_to_hybrid_bucket_uncapped(n - 1) == n


@pytest.mark.parametrize("x", [0, -1, -100])
def test_nothing_and_less_maps_to_one(x: int) -> None:
    assert map_to_hybrid_bucket_uncapped(x) == 1
    assert map_to_hybrid_bucket(x, 8192) == 1
    assert next_positive_power_of_2(x) == last_positive_power_of_2(x) == 1


@given(sizes, sizes)
def test_the_map_rounds_up_is_monotone_and_idempotent(x: int, y: int) -> None:
    bucket = map_to_hybrid_bucket_uncapped(x)
    assert bucket >= x
    assert map_to_hybrid_bucket_uncapped(bucket) == bucket
    assert bucket in get_hybrid_num_tokens_buckets(bucket)
    assert (bucket <= map_to_hybrid_bucket_uncapped(y)) or x > y


@given(sizes, sizes)
def test_the_capped_map_is_the_uncapped_one_up_to_its_cap(x: int, cap: int) -> None:
    assert map_to_hybrid_bucket(x, cap) == min(map_to_hybrid_bucket_uncapped(x), cap)
    assert map_to_hybrid_bucket(x, cap) in get_hybrid_num_tokens_buckets(cap)


@given(sizes)
def test_powers_of_two_enclose(x: int) -> None:
    below, above = last_positive_power_of_2(x), next_positive_power_of_2(x)
    assert below <= x <= above
    assert above in (below, 2 * below)


@pytest.mark.parametrize(
    ("x", "up", "expected"),
    [
        (350, False, 200),
        (350, True, 500),
        (2000, True, 1000),
        (5, False, 100),
        (200, False, 200),
        (200, True, 200),
    ],
)
def test_rounding_to_explicit_buckets(x: int, up: bool, expected: int) -> None:
    buckets = [100, 200, 500, 1000]
    assert round_to_nearest_bucket(x, buckets, up) == expected
    assert round_to_nearest_bucket(x, buckets, round_up=up) == expected
    assert make_bucket_mapper((1000, 200, 100, 500, 200), up)(x) == expected
    assert make_bucket_mapper((100, 200, 500, 1000), round_map=up)(x) == expected


@given(bucket_sets, st.integers(-10, 6000), st.booleans())
def test_a_mapper_gives_the_nearest_bucket_in_its_direction(buckets: list[int], x: int, up: bool) -> None:
    bucket = make_bucket_mapper(buckets, round_up=up)(x)
    inside = [b for b in buckets if (b >= x if up else b <= x)]
    assert bucket == ((min if up else max)(inside) if inside else (max if up else min)(buckets))


@pytest.mark.parametrize("bad", [(), [], (0, 1), (-1,), (1.5,), ("a",), (True,), 7])
def test_buckets_must_be_positive_integers(bad: object) -> None:
    with pytest.raises(TuningError, match="positive integer"):
        make_bucket_mapper(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive integer"):
        round_to_nearest_bucket(3, bad)  # type: ignore[arg-type]


def test_tile_aware_buckets_lie_where_tokens_per_expert_cross_a_tile() -> None:
    generate, to_bucket = make_tile_aware_buckets(num_experts=96, top_k=8, tiles=(64, 128))
    buckets = generate(4096)
    for tile in (64, 128):
        assert {tile * 96 // 8, tile // 2 * 96 // 8} <= set(buckets)
    assert to_bucket(700) == 768 == 64 * 96 // 8
    assert to_bucket(380) == 384 == 32 * 96 // 8


@given(
    st.integers(1, 512), st.integers(1, 16), st.lists(st.sampled_from([16, 64, 128, 256]), min_size=1), sizes
)
def test_a_tile_aware_map_rounds_up_to_a_generated_bucket(
    experts: int, top_k: int, tiles: list[int], x: int
) -> None:
    generate, to_bucket = make_tile_aware_buckets(experts, top_k, tiles)
    bucket = to_bucket(x)
    assert bucket >= x
    assert bucket in generate(bucket)
    assert to_bucket(bucket) == bucket
    assert bucket <= map_to_hybrid_bucket_uncapped(x)

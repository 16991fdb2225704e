"""Bucket generators and maps: pure functions from sizes to sizes.

A generator lists the buckets up to a size; a map sends a size to its bucket. The hybrid scheme is dense where
a kernel's best tile changes and sparse where it does not: powers of two up to 256, every 256 up to 2048,
every 512 up to 4096, powers of two beyond. Nothing here has a largest size: buckets follow the size that is
asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from moestro.errors import TuningError

__all__ = [
    "BucketMap",
    "get_hybrid_num_tokens_buckets",
    "last_positive_power_of_2",
    "make_bucket_mapper",
    "make_tile_aware_buckets",
    "map_to_hybrid_bucket",
    "map_to_hybrid_bucket_uncapped",
    "next_positive_power_of_2",
    "round_to_nearest_bucket",
]

BucketMap = Callable[[int], int]


class BucketError(TuningError, ValueError):
    """Buckets that are no buckets: none, or not positive integers."""


POWERS_UP_TO = 256
STEPS = ((2048, 256), (4096, 512))  # (up to and including, step)


def next_positive_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x, and at least 1."""
    return 1 if x <= 1 else 1 << (x - 1).bit_length()


def last_positive_power_of_2(x: int) -> int:
    """The largest power of two that is at most x, and at least 1."""
    return 1 if x <= 1 else 1 << (x.bit_length() - 1)


def map_to_hybrid_bucket_uncapped(x: int) -> int:
    """The first hybrid bucket at or above x; 1 for x <= 0. Monotone, idempotent, without an upper limit."""
    if x > POWERS_UP_TO:
        for end, step in STEPS:
            if x <= end:
                return -(-x // step) * step
    return next_positive_power_of_2(x)


def map_to_hybrid_bucket(x: int, max_num_tokens: int) -> int:
    """As map_to_hybrid_bucket_uncapped, but never above max_num_tokens, which is the last bucket."""
    _positive("max_num_tokens", max_num_tokens)
    return min(map_to_hybrid_bucket_uncapped(x), max_num_tokens)


def get_hybrid_num_tokens_buckets(max_num_tokens: int, min_num_tokens: int = 1) -> tuple[int, ...]:
    """The hybrid buckets in [min_num_tokens, max_num_tokens], ascending, and max_num_tokens itself."""
    _positive("max_num_tokens", max_num_tokens)
    buckets = []
    point = map_to_hybrid_bucket_uncapped(min_num_tokens)
    while point < max_num_tokens:
        buckets.append(point)
        point = map_to_hybrid_bucket_uncapped(point + 1)
    return (*buckets, max_num_tokens)


def round_to_nearest_bucket(
    x: int, buckets: Sequence[int], round_map: bool = False, *, round_up: bool | None = None
) -> int:
    """The bucket at or below x, or with round_map (also spelled round_up) at or above x; the end bucket past
    the ends.

    Raises BucketError (a TuningError and a ValueError) if `buckets` is empty or holds anything but positive
    integers.
    """
    ordered = checked_buckets(buckets, "buckets")
    return _round(x, ordered, round_map if round_up is None else round_up)


def make_bucket_mapper(
    buckets: Iterable[int], round_map: bool = False, *, round_up: bool | None = None
) -> BucketMap:
    """A map onto these buckets, as round_to_nearest_bucket; duplicates and order do not matter."""
    ordered = checked_buckets(buckets, "buckets")
    up = round_map if round_up is None else round_up

    def map_to_bucket(x: int) -> int:
        return _round(x, ordered, up)

    return map_to_bucket


def make_tile_aware_buckets(
    num_experts: int, top_k: int, tiles: Iterable[int]
) -> tuple[Callable[[int], tuple[int, ...]], BucketMap]:
    """(generator, map) for an MoE layer: the hybrid buckets and the token counts where a tile fills up.

    With N tokens an expert gets N * top_k / num_experts tokens on average; a tile of T rows is worth its
    padding from about half full on and needs a second one beyond full. So for every tile T the sizes N with
    N*K/E = T/2 and T are buckets. The map rounds up to the next of them.
    """
    _positive("num_experts", num_experts)
    _positive("top_k", top_k)
    loads = {load for tile in checked_buckets(tiles, "tiles") for load in (tile // 2, tile) if load}
    edges = sorted({max(1, load * num_experts // top_k) for load in loads})

    def generate(max_num_tokens: int) -> tuple[int, ...]:
        hybrid = get_hybrid_num_tokens_buckets(max_num_tokens)
        return tuple(sorted({*hybrid, *edges[: bisect_right(edges, max_num_tokens)]}))

    def map_to_bucket(x: int) -> int:
        hybrid = map_to_hybrid_bucket_uncapped(x)
        at = bisect_left(edges, x)
        return min(hybrid, edges[at]) if x > 0 and at < len(edges) else hybrid

    return generate, map_to_bucket


def checked_buckets(buckets: Iterable[int], name: str) -> tuple[int, ...]:
    """The distinct buckets, ascending. Raises BucketError unless they are at least one positive integer."""
    try:
        given = tuple(buckets)
    except TypeError:
        raise BucketError(f"{name} must be positive integers, got {buckets!r}") from None
    if not given:
        raise BucketError(f"{name} must hold at least one positive integer, got none")
    for bucket in given:
        if isinstance(bucket, bool) or not hasattr(bucket, "__index__") or bucket < 1:
            raise BucketError(f"{name} must be positive integers, got {bucket!r} in {given!r}")
    return tuple(sorted({int(bucket) for bucket in given}))


def _round(x: int, ordered: Sequence[int], up: bool) -> int:
    at = bisect_left(ordered, x) if up else bisect_right(ordered, x) - 1
    return ordered[min(max(at, 0), len(ordered) - 1)]


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise BucketError(f"{name} must be a positive integer, got {value!r}")

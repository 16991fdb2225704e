"""The models table, nearest names, explicit sizes and expert-parallel slices."""

from __future__ import annotations

import pytest

from moestro.bench.models import MODELS, find, from_sizes
from moestro.errors import ModelError


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3-30b-a3b", (128, 8, 2048, 768)),
        ("deepseek-v3", (256, 8, 7168, 2048)),
        ("mixtral-8x7b", (8, 2, 4096, 14336)),
        ("gpt-oss-20b", (32, 4, 2880, 2880)),
        ("kimi-k2", (384, 8, 7168, 2048)),
        ("qwen3-next-80b-a3b", (512, 10, 2048, 512)),
    ],
)
def test_sizes_are_those_of_the_published_configs(name: str, sizes: tuple[int, ...]) -> None:
    shape = find(name)
    assert (shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size) == sizes


def test_names_are_found_however_they_are_written() -> None:
    assert find("Qwen/Qwen3-30B-A3B") is find("qwen3_30b_a3b") is MODELS["qwen3-30b-a3b"]


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'qwen3-30b-a3b'"):
        find("qwen3-30b-a3")


def test_weights_are_counted_with_and_without_a_gate() -> None:
    assert find("qwen3-30b-a3b").num_weights == 128 * 3 * 2048 * 768
    assert find("nemotron-3-nano-30b").num_weights == 128 * 2 * 2688 * 1856


@pytest.mark.parametrize("text", ["", "1,2,3", "8,2,64,x", "8,2,64,-32", "8,2,64,0", "1,2,3,4,5"])
def test_sizes_that_are_not_four_positive_integers_are_refused(text: str) -> None:
    with pytest.raises(ModelError, match="four positive integers E,K,H,I"):
        from_sizes(text)


def test_top_k_beyond_the_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="top_k = 9 is more than the 8 experts"):
        from_sizes("8,9,64,32")


def test_a_slice_holds_its_share_of_the_experts() -> None:
    shape = find("deepseek-v3").on_ranks(8)
    assert shape.num_local_experts == 32
    assert shape.num_weights == 32 * 3 * 7168 * 2048
    assert "EP8" in shape.describe()


@pytest.mark.parametrize("ep", [0, -1, 3])
def test_a_slice_that_does_not_divide_the_experts_is_refused(ep: int) -> None:
    with pytest.raises(ModelError, match="divides the 256 experts"):
        find("deepseek-v3").on_ranks(ep)


def test_local_pairs_need_enough_local_experts() -> None:
    with pytest.raises(ModelError, match="fewer than top_k"):
        find("deepseek-v3").on_ranks(64, local_pairs=True)

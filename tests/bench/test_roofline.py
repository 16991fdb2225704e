"""Bytes and FLOPs of a call against counts by hand, and ceilings that are sane."""

from __future__ import annotations

import torch

from moestro.bench.layers import Case
from moestro.bench.models import MoeShape, from_sizes
from moestro.bench.roofline import Ceilings, Work, count_work, measure_ceilings


def case_of(ids: list[list[int]], hidden: int) -> Case:
    tensor = torch.tensor(ids, dtype=torch.int32)
    return Case(
        len(ids), torch.zeros(len(ids), hidden, dtype=torch.bfloat16), tensor, torch.ones(tensor.shape)
    )


def test_work_counts_each_hit_expert_once(tiny: MoeShape) -> None:
    # 3 tokens, 2 experts each, experts 1, 2, 5 hit; bf16: 3·64·32 weights of 2 bytes an expert
    case = case_of([[1, 2], [2, 5], [1, 5]], 64)
    work = count_work(tiny, case, layer_bytes=8 * 3 * 64 * 32 * 2)
    assert work == Work(
        num_bytes=3 * 12288 + 2 * 3 * 64 * 2,
        flops=2 * 6 * 6144,
        weight_bytes=3 * 12288,
        experts_hit=3,
        pairs=6,
    )


def test_work_counts_only_this_ranks_pairs(tiny: MoeShape) -> None:
    shape = tiny.on_ranks(2)  # experts 0..3 are here
    work = count_work(shape, case_of([[1, 7], [4, 6], [3, 1]], 64), layer_bytes=4 * 1000)
    assert (work.experts_hit, work.pairs, work.weight_bytes) == (2, 3, 2000)
    assert work.flops == 2 * 3 * 6144


def test_work_without_a_gate_does_two_thirds() -> None:
    shape = from_sizes("8,2,64,32", "relu2")
    assert count_work(shape, case_of([[0, 1]], 64), 0).flops == 2 * 2 * 2 * 64 * 32


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(bytes_per_s=10.0, flops_per_s=100.0, dtype="bfloat16")
    assert ceilings.seconds(Work(50, 100, 0, 0, 0)) == 5.0
    assert ceilings.seconds(Work(50, 1000, 0, 0, 0)) == 10.0


def test_ceilings_are_measured_on_this_machine() -> None:
    ceilings = measure_ceilings("cpu")
    assert 1e8 < ceilings.bytes_per_s < 1e13
    assert 1e8 < ceilings.flops_per_s < 1e16

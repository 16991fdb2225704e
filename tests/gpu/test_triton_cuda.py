"""The Triton backend on a CUDA device: its launches in graphs, and what programs wait for each other with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import wide_tiles

from moestro import ExpertWeights, FusedMoE, reference
from moestro.kernels.triton import Tactic, chip, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

E, K, H, I = 24, 4, 512, 320  # noqa: E741


def layer(num_tokens: int, seed: int = 0) -> tuple[ExpertWeights, FusedMoE, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1
    weights = ExpertWeights.from_dense(gate_up.cuda(), down.cuda(), "nvfp4")
    moe = FusedMoE(weights, K, backend="triton", max_num_tokens=64, use_cuda_graph=True)
    return weights, moe, call(num_tokens, seed)


def call(num_tokens: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, E, generator=g).argsort(-1)[:, :K].int().contiguous()
    x = torch.randn(num_tokens, H, generator=g).bfloat16()
    return [t.cuda() for t in (x, ids, torch.rand(num_tokens, K, generator=g))]


def chains(num_tokens: int) -> list[Tactic]:
    moe = layer(1)[1]
    problem = moe.runners[0].problem
    return [t for t in choose.candidates(problem, num_tokens) if t.path == "chain"]


def test_several_numbers_of_tokens_are_captured_from_one_layer_and_replayed_in_turn() -> None:
    weights, moe, _ = layer(1)
    captured = []
    for n in (1, 4, 33, 64):
        inputs = call(n, n)
        y = torch.empty_like(inputs[0])
        moe(*inputs, out=y)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moe(*inputs, out=y)
        captured.append((graph, inputs, y))
    for turn in range(3):
        for graph, inputs, y in captured:
            for old, new in zip(inputs, call(len(y), 100 + turn), strict=True):
                old.copy_(new)
            y.fill_(torch.nan)
            graph.replay()
            expected = reference.fused_moe(*inputs, weights)
            assert float((y.float() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("num_tokens", [1, 4, 64])
def test_chained_products_repeat_bit_for_bit(num_tokens: int) -> None:
    """A tile that read before another had written would differ, now or then."""
    weights, moe, inputs = layer(num_tokens)
    runner = moe.runners[0]
    found = chains(num_tokens)
    assert found
    expected = reference.fused_moe(*inputs, weights)
    for tactic in found:
        out = torch.empty_like(inputs[0])
        size = runner.workspace_bytes(num_tokens, tactic)
        first = None
        for _ in range(30):
            runner.use_workspace(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"))
            runner.forward([*inputs, out], tactic)
            if first is None:
                first = out.clone()
                assert float((out.float() - expected).norm() / expected.norm()) < 1e-2
            assert torch.equal(first, out)


@pytest.mark.skipif(not chip.has_wgmma(), reason="needs wgmma")
@pytest.mark.parametrize("tactic", wide_tiles.TILES, ids=wide_tiles.name)
@pytest.mark.parametrize("sizes", [(256, 192), (272, 176), (640, 1040)], ids=str)
def test_wide_products_equal_the_reference_and_repeat(tactic: Tactic, sizes: tuple[int, int]) -> None:
    hidden, inter = sizes
    g = torch.Generator().manual_seed(tactic.pairs1)
    gate_up, down = torch.randn(5, 2 * inter, hidden, generator=g), torch.randn(5, hidden, inter, generator=g)
    biases = torch.randn(5, 2 * inter, generator=g).cuda(), torch.randn(5, hidden, generator=g).cuda()
    weights = ExpertWeights.from_dense(gate_up.cuda() * 0.1, down.cuda() * 0.1, "nvfp4")
    weights = replace(weights, gate_up_bias=biases[0], down_bias=biases[1])
    runner = FusedMoE(weights, 2, backend="triton").runners[0]
    for n in (1, 3, 17, 64, 257, 1024):
        x = torch.randn(n, hidden, generator=g).bfloat16().cuda()
        ids = (
            (torch.rand(n, 4, generator=g).argsort(-1)[:, :2].int() + (n % 2)).contiguous().cuda()
        )  # one idle
        routing = torch.rand(n, 2, generator=g).cuda()
        expected = reference.fused_moe(x, ids, routing, weights)
        results = []
        for _ in range(2):
            out = torch.full_like(x, torch.nan)
            size = runner.workspace_bytes(n, tactic)
            runner.use_workspace(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"))
            runner.forward([x, ids, routing, out], tactic)
            results.append(out)
        assert float((results[0].float() - expected).norm() / expected.norm()) < 1e-2
        assert torch.equal(*results)


FORMATS = ("nvfp4", "mxfp4", "fp8_block", "bf16")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_has_the_same_bits_whatever_its_batch(fmt: str) -> None:
    """Other numbers of tokens, orders and neighbours, by every tactic of a batch-invariant layer."""
    g = torch.Generator().manual_seed(7)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1
    weights = ExpertWeights.from_dense(gate_up.bfloat16().cuda(), down.bfloat16().cuda(), fmt)
    runner = FusedMoE(weights, K, backend="triton", batch_invariant=True).runners[0]
    whole = call(300, 5)
    expected = torch.empty_like(whole[0])
    runner.forward([*whole, expected], -1)
    for n in (1, 3, 17, 64, 255, 300):
        at = torch.randperm(300, generator=g)[:n].cuda()
        inputs = [t[at].contiguous() for t in whole]
        for tactic in (-1, *choose.candidates(runner.problem, n)):
            out = torch.full_like(inputs[0], torch.nan)
            runner.forward([*inputs, out], tactic)
            assert torch.equal(out, expected[at]), (n, tactic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_matches_the_reference(fmt: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    gate_up, down = torch.randn(E, 2 * I, H, generator=g) * 0.1, torch.randn(E, H, I, generator=g) * 0.1
    weights = ExpertWeights.from_dense(gate_up.to(dtype).cuda(), down.to(dtype).cuda(), fmt)
    runner = FusedMoE(weights, K, backend="triton", dtype=dtype).runners[0]
    for n in (1, 9, 130, 700):
        x, ids, routing = call(n, n)
        inputs = [x.to(dtype), ids, routing]
        expected = reference.fused_moe(*inputs, weights)
        for tactic in choose.candidates(runner.problem, n):
            out = torch.full_like(inputs[0], torch.nan)
            runner.forward([*inputs, out], tactic)
            assert float((out.float() - expected).norm() / expected.norm()) < 1e-2, (n, tactic)


def test_chains_of_two_streams_do_not_share_their_counters() -> None:
    weights, moe, inputs = layer(33)
    runner, streams = moe.runners[0], [torch.cuda.Stream() for _ in range(2)]
    tactic = chains(33)[0]
    expected = reference.fused_moe(*inputs, weights)
    outs = [torch.empty_like(inputs[0]) for _ in streams]
    spaces = [
        torch.empty(runner.workspace_bytes(33, tactic), dtype=torch.uint8, device="cuda") for _ in streams
    ]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, out, space in zip(streams, outs, spaces, strict=True):
            with torch.cuda.stream(stream):
                runner.forward([*inputs, out], tactic, workspace=space)
    torch.cuda.synchronize()
    for out in outs:
        assert float((out.float() - expected).norm() / expected.norm()) < 1e-2

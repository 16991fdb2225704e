"""The warp-specialised product on the CPU (gluon_machine.py), in many interleavings of its partitions."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_machine
import wide_tiles
from test_kernels import TOLERANCE, error, inputs_of, make

from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.triton.device import warp_specialized as kernels
from moestro.kernels.triton.paths import warp_specialized
from moestro.kernels.triton.paths.warp_specialized import tactic
from moestro.kernels.triton.tactic import Tactic, Tile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")

SLIM, TALL = tactic(96, Tile(256, 4, 8, 9), "halves"), tactic(128, Tile(256, 4, 8, 7))
FLAT, FLATTER = (tactic(pairs, Tile(128, 4, 8, 5), "halves") for pairs in (256, 288))


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel = kernels.wide_gemm

    def start(seed: int, **mutants: tuple[str, str]) -> None:
        monkeypatch.setattr(warp_specialized, "has_wgmma", lambda: True)
        monkeypatch.setattr(kernels, "wide_gemm", gluon_machine.GluonMachine(kernel, seed, mutants))

    return start


@pytest.mark.parametrize("tile", wide_tiles.TILES, ids=wide_tiles.name)
def test_wide_products_match_the_reference_on_odd_sizes(tile: Tactic, on_machine: Any) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    on_machine(tile.pairs1 + sum(tile.gemm1) + len(tile.narrow))
    for sizes, tokens in (((4, 2, 144, 80), (1, 37)), ((4, 2, 640, 112), (420,))):
        runner, plain = make(sizes, "nvfp4", biases=True, foreign=1)
        for n in tokens:
            inputs = inputs_of(runner, n)
            inputs[1][inputs[1] == 2] = 3
            inputs[1][n - 1] = torch.tensor([-7, 1])
            assert error(runner, plain, inputs, tile) < TOLERANCE


@pytest.mark.parametrize("tile", [SLIM, TALL, FLATTER], ids=wide_tiles.name)
def test_parts_of_the_columns_add_up_and_add_the_bias_once(
    tile: Tactic, on_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_specialized, "LONG", 64)
    on_machine(7)
    runner, plain = make((4, 2, 144, 384), "nvfp4", biases=True, foreign=1)
    inputs = inputs_of(runner, 150)
    for parts in (2, 3):  # of two blocks, and of three
        assert error(runner, plain, inputs, replace(tile, split_k=parts)) < TOLERANCE


@pytest.mark.parametrize("fmt", ["mxfp4", "fp8_block"])
@pytest.mark.parametrize("tile", [SLIM, TALL, FLATTER], ids=wide_tiles.name)
def test_other_formats_decode_beside_the_products(tile: Tactic, fmt: str, on_machine: Any) -> None:
    """With biases; 8 rows of FP8 blocks share a scale; the 80 gate rows end within a block of 128."""
    on_machine(3)
    runner, plain = make((4, 2, 160, 96) if fmt == "mxfp4" else (4, 2, 144, 80), fmt, biases=True, foreign=1)
    fits = warp_specialized.fitted(runner.problem, tile)
    assert error(runner, plain, inputs_of(runner, 150), fits) < TOLERANCE


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
def test_wide_activations(act: Activation, on_machine: Any) -> None:
    on_machine(1)
    runner, plain = make((3, 2, 128, 96), "nvfp4", act)
    assert error(runner, plain, inputs_of(runner, 70), TALL) < TOLERANCE


@pytest.mark.parametrize("tile", [TALL, FLATTER], ids=wide_tiles.name)
def test_every_interleaving_gives_the_same_bits(tile: Tactic, on_machine: Any) -> None:
    """Stages of the ring are used several times over, tiles follow each other in a program."""
    runner, plain = make((3, 2, 640, 96), "nvfp4")
    inputs = inputs_of(runner, 150)
    results = []
    for seed in range(5):
        on_machine(seed)
        assert error(runner, plain, inputs, tile) < TOLERANCE
        results.append(inputs[3].clone())
    assert all(torch.equal(results[0], r) for r in results)


MUTANTS = {  # function, its text, the wrong text, the tile, tokens (two thirds of them are an expert's pairs)
    "a stage is read before it is full": (
        "_step", "mbarrier.wait(ring.full.index(stage), phase)", "pass", TALL, 120),
    "a stage is filled before it is empty": (
        "_fill", "mbarrier.wait(ring.empty.index(stage), phase)", "pass", TALL, 120),
    "64 rows give a stage back while a product reads it": (
        "_retire", "wait(RUNNING", "wait(RUNNING + 1", FLAT, 120),
    "128 rows give a stage back while a product reads it": (
        "_retire_both", "wait(RUNNING", "wait(RUNNING + 1", TALL, 60),
    "the same where a tile is three quarters wide": (
        "_retire_both", "2 * RUNNING", "2 * RUNNING + 1", TALL, 120),
    "288 pairs give a stage back while a product reads it": (
        "mma_64", "_retire(acc, acc2, a, 0, W2)", "(acc, acc2, a)", FLATTER, 400),
    "the pairs beyond 256 are not copied": (
        "_fill", "copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + ahead * 64)", "pass", FLATTER, 400),
    "the proxies are not fenced": ("_step", "fence_async_shared()", "pass", TALL, 120),
    "the last product is not waited for": (
        "mma_64_pingpong", "acc, acc2, b = _retire(acc, acc2, b, 0, W2)", "pass", FLAT, 120),
    "the phase is not turned": ("following", "phase ^ wrap", "phase", TALL, 120),
    "too narrow a tile": ("_consume", "count <= 2 * Q", "count <= 3 * Q", TALL, 120),
    "pairs beyond 64 in too narrow a tile": (
        "_consume", "count <= BN + EXTRA // 2", "count <= BN + EXTRA", SLIM, 135),
    "too few of the pairs beyond 64 are copied": (
        "_produce", "count <= BN + EXTRA // 2", "count <= BN + EXTRA", SLIM, 135),
    "a stage of the turn is left out": (
        "_fill", "first + u < blocks", "first + u < blocks - 1", TALL, 120),
    "a row beyond the expert's is written": ("_pairs", "i < at.count, other", "i <= at.count, other", TALL, 120),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_notices_a_kernel_that_is_wrong(name: str, on_machine: Any) -> None:
    function, old, new, tile, num_tokens = MUTANTS[name]
    runner, plain = make((3, 2, 640, 96), "nvfp4")
    inputs = inputs_of(runner, num_tokens)

    def right(seed: int) -> bool:
        on_machine(seed, **{function: (old, new)})
        return error(runner, plain, inputs, tile) < TOLERANCE

    assert gluon_machine.notices(right, 12)


@pytest.mark.timeout(20)
def test_a_mistake_ends_a_program_whose_other_partitions_have_not_begun() -> None:
    def wrong() -> None:
        raise AssertionError("of the first")

    for seed in range(20):
        program = gluon_machine.Program(0, 1, random.Random(seed))
        with pytest.raises(AssertionError, match="of the first"):
            program.run([wrong, *[lambda p=program: p.here.pause(lambda: False)] * 2])

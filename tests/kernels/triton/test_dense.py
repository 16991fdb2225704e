"""The warp-specialised product of dense weights on the CPU (gluon_machine.py), in many interleavings of its partitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_machine
from test_kernels import TOLERANCE, error, inputs_of, make
from wide_tiles import name

from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.triton.device import dense as kernels
from moestro.kernels.triton.paths import dense
from moestro.kernels.triton.paths.dense import FEW, TABLE, tactic
from moestro.kernels.triton.tactic import Tactic, Tile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")

SLIM, TALL = tactic(96, Tile(256, 4, 8, 4)), tactic(128, Tile(256, 4, 8, 4), "quarters")
FLAT, FLATTER = tactic(256, Tile(128, 4, 8, 4), "quarters"), tactic(288, Tile(128, 4, 8, 4))
TILES = (
    *TABLE["dense"],
    tactic(128, Tile(256, 1, 8, 4), ""),  # one stage a turn
    tactic(128, Tile(128, 2, 4, 3), "halves"),  # one consumer
    tactic(64, Tile(64, 2, 4, 4), "quarters"),
)


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel = kernels.dense_wide_gemm

    def start(seed: int, **mutants: tuple[str, str]) -> None:
        monkeypatch.setattr(dense, "has_wgmma", lambda: True)
        monkeypatch.setattr(kernels, "dense_wide_gemm", gluon_machine.GluonMachine(kernel, seed, mutants))

    return start


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_dense_products_match_the_reference_on_odd_sizes(tile: Tactic, on_machine: Any) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs, one of more pairs
    than a tile has.
    """
    on_machine(tile.pairs1 + sum(tile.gemm1) + len(tile.narrow))
    for sizes, n in (((4, 2, 144, 80), 1), ((3, 2, 264, 104), tile.pairs1 * 3 // 2)):
        runner, plain = make(sizes, "bf16", biases=True, foreign=1)
        inputs = inputs_of(runner, n)
        inputs[1][inputs[1] == 2] = 3
        inputs[1][n - 1] = torch.tensor([-7, 1])
        assert error(runner, plain, inputs, tile) < TOLERANCE
    assert (inputs[1] == 3).sum() > tile.pairs1


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_activations(act: Activation, dtype: torch.dtype, on_machine: Any) -> None:
    on_machine(1)
    runner, plain = make((3, 2, 136, 88), "bf16", act, dtype=dtype)
    assert error(runner, plain, inputs_of(runner, 70), TALL) < TOLERANCE


@pytest.mark.parametrize("tile", [TALL, FLATTER], ids=name)
def test_every_interleaving_gives_the_same_bits(tile: Tactic, on_machine: Any) -> None:
    """Stages of the ring are used several times over, tiles follow each other in a program."""
    runner, plain = make((3, 2, 448, 320), "bf16")
    inputs = inputs_of(runner, 150)
    results = []
    for seed in range(3):
        on_machine(seed)
        assert error(runner, plain, inputs, tile) < TOLERANCE
        results.append(inputs[3].clone())
    assert all(torch.equal(results[0], r) for r in results)


def test_every_tile_gives_the_same_bits(on_machine: Any) -> None:
    """The sum over the columns has one order, whatever the tile."""
    runner, plain = make((3, 2, 264, 136), "bf16", biases=True)
    inputs = inputs_of(runner, 160)
    results = []
    for tile in (FEW, TALL, FLATTER, TILES[-2]):
        on_machine(0)
        assert error(runner, plain, inputs, tile) < TOLERANCE
        results.append(inputs[3].clone())
    assert all(torch.equal(results[0], r) for r in results)


MUTANTS = {  # function, its text, the wrong text, the tile, tokens (two thirds of them are an expert's pairs)
    "a stage is read before it is full": (
        "_multiply", "mbarrier.wait(ring.full.index(stage), phase)", "pass", TALL, 120),
    "gathered rows: a stage is filled before it is empty": (
        "_gather", "mbarrier.wait(ring.empty.index(stage), phase)", "pass", TALL, 120),
    "rows in order: a stage is filled before it is empty": (
        "_copy", "mbarrier.wait(ring.empty.index(stage), phase)", "pass", TALL, 120),
    "64 rows give a stage back while a product reads it": (
        "_retire", "wait(RUNNING, deps=[acc])", "wait(RUNNING + 1, deps=[acc])", FLAT, 340),
    "128 rows give a stage back while a product reads it": (
        "_retire", "wait(2 * RUNNING, deps=[acc, accb])", "wait(2 * RUNNING + 1, deps=[acc, accb])", TALL, 60),
    "the same where a tile is three quarters wide": (
        "_retire", "wait(4 * RUNNING", "wait(4 * RUNNING + 1", TALL, 120),
    "the pairs beyond 256 are not gathered": (
        "_gather", "copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + u * 64)", "pass", FLATTER, 400),
    "fewer bytes are expected than come": (
        "_copy", "(TILE.rows + W + W2) * 128", "(TILE.rows + W) * 128", FLATTER, 400),
    "the proxies are not fenced": ("_multiply", "fence_async_shared()", "pass", TALL, 120),
    "up's rows in the place of another expert's gate": (
        "_copy_weights", "e * (call.size.rows // 8)", "e * (call.size.rows // 16)", TALL, 120),
    "too narrow a tile": ("_consume", "count <= 2 * Q", "count <= 3 * Q", TALL, 120),
    "pairs beyond 64 in too narrow a tile": (
        "_consume", "count <= BN + EXTRA // 2", "count <= BN + EXTRA", SLIM, 135),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_notices_a_kernel_that_is_wrong(name: str, on_machine: Any) -> None:
    function, old, new, tile, num_tokens = MUTANTS[name]
    runner, plain = make((3, 2, 640, 320), "bf16")
    inputs = inputs_of(runner, num_tokens)

    def right(seed: int) -> bool:
        on_machine(seed, **{function: (old, new)})
        return error(runner, plain, inputs, tile) < TOLERANCE

    assert gluon_machine.notices(right, 12)

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
from moestro.kernels.triton.paths.dense import TABLE, tactic
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
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    on_machine(tile.pairs1 + sum(tile.gemm1) + len(tile.narrow))
    for sizes, tokens in (((4, 2, 144, 80), (1, 37)), ((4, 2, 328, 104), (420,))):
        runner, plain = make(sizes, "bf16", biases=True, foreign=1)
        for n in tokens:
            inputs = inputs_of(runner, n)
            inputs[1][inputs[1] == 2] = 3
            inputs[1][n - 1] = torch.tensor([-7, 1])
            assert error(runner, plain, inputs, tile) < TOLERANCE


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_activations(act: Activation, dtype: torch.dtype, on_machine: Any) -> None:
    on_machine(1)
    runner, plain = make((3, 2, 136, 88), "bf16", act, dtype=dtype)
    assert error(runner, plain, inputs_of(runner, 70), TALL) < TOLERANCE

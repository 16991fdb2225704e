"""FP8 activations of weights that no FP8 product takes: rows rounded to e4m3, which bfloat16 products hold exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fp8_rows import Quantize
from test_kernels import DEVICE, SIZES, TACTICS, error, inputs_of, make

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import TritonRunner, chip, choose
from moestro.kernels.triton.device import fp8 as fp8_device
from moestro.kernels.triton.fp8_layout import packed_type
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.paths import kind_of

FORMATS = ("int4", "mxfp8", "bf16")
TOLERANCE = 1.5e-2  # the interpreter rounds to bfloat16 towards zero, and what stands between two e4m3 goes either way
WAYS = ("few", "sorted", "narrowing", "dequantized")


@pytest.fixture(autouse=True)
def quantised_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(fp8_device, "quantize_fp8", Quantize())


def problem(fmt: str, **rest: Any) -> MoeProblem:
    return MoeProblem(32, 32, 0, 8, 7168, 2048, fmt, input_format="fp8", device="cuda", **rest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_way_matches_the_reference_on_odd_sizes(fmt: str, way: str) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    runner, plain = make(SIZES.get(fmt, (4, 2, 144, 80)), fmt, biases=True, foreign=1, input_format="fp8")
    inputs = inputs_of(runner, 11 if way == "few" else 90)
    inputs[1][inputs[1] == 2] = 3  # nobody comes to local expert 1
    inputs[1][0] = torch.tensor([-7, 1 << 30])
    assert error(runner, plain, inputs, TACTICS[way]) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_default_tactic(fmt: str, num_tokens: int) -> None:
    runner, plain = make((4, 2, 128, 64), fmt, input_format="fp8")
    assert error(runner, plain, inputs_of(runner, num_tokens), -1) < TOLERANCE


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_number_of_tokens_falls_to_another_backend(fmt: str) -> None:
    for invariant in (False, True):
        p = problem(fmt, deterministic=invariant, batch_invariant=invariant)
        assert TritonRunner._unsupported(p) is None
        assert (kind_of(p), packed_type(p)) == ("rounded", PACKED.get(fmt))
        for num_tokens in (1, 2, 8, 64, 512, 4096, 16384):
            tactic = choose.default(p, num_tokens)
            assert choose.why_not(p, tactic, num_tokens) is None
            assert tactic in choose.candidates(p, num_tokens) or tactic.path == "fused"


@pytest.mark.parametrize(
    ("capability", "own"), [((9, 0), "nvfp4 mxfp4 fp8_block"), ((10, 0), "mxfp4 mxfp8"), ((12, 0), "")]
)
def test_formats_with_fp8_products_keep_to_those(
    capability: tuple[int, int], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip, "capability", lambda: capability)
    every = ("nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4", "bf16")
    assert [fmt for fmt in every if kind_of(problem(fmt)) == "fp8"] == own.split()
    assert {kind_of(problem(fmt)) for fmt in every} <= {"fp8", "rounded"}

"""MXFP4 and MXFP8 with e4m3 activations as block-scaled tensor cores run them, in Triton's interpreter, against the
reference of the same numerics: weights are not rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.8")  # whose interpreter has dot_scaled

from fp8_rows import Quantize
from test_kernels import error, inputs_of
from test_kernels import make as make_runner

from moestro.errors import BackendError
from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, TritonRunner, chip, choose
from moestro.kernels.triton.device import fp8 as fp8_device
from moestro.kernels.triton.device.fp8 import Recipe, quantize_fp8
from moestro.kernels.triton.paths import fp8_mx, kind_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a chip of another capability is here")
TOLERANCE = 1e-3  # of the relative norm, with x and results in float16; the interpreter rounds towards zero
SIZES = (4, 2, 160, 96)
SMALL = fp8_mx.tactic(16, Tile(128, 1, 4, 2))
TWO_WIDTHS = replace(SMALL, pairs2=32, raster_group=4)
EVEN_STEPS = fp8_mx.tactic(32, Tile(128, 2, 4, 3))


@pytest.fixture(autouse=True)
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "capability", lambda: (10, 0))
    monkeypatch.setattr(fp8_device, "quantize_fp8", Quantize())


def make(*args: Any, dtype: torch.dtype = torch.float16, **rest: Any) -> tuple[TritonRunner, Any]:
    return make_runner(*args, input_format="fp8", dtype=dtype, **rest)


def problem(fmt: str = "mxfp4", **rest: Any) -> MoeProblem:
    return MoeProblem(32, 32, 0, 8, 7168, 2048, fmt, input_format="fp8", **rest)


@pytest.mark.parametrize("tactic", [SMALL, TWO_WIDTHS, EVEN_STEPS], ids=["small", "two widths", "even"])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8"])
def test_matches_the_reference_on_odd_sizes(fmt: str, tactic: Tactic) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    runner, plain = make(SIZES, fmt, biases=True, foreign=1)
    inputs = inputs_of(runner, 41)
    inputs[1][inputs[1] == 2] = 3  # nobody comes to local expert 1
    inputs[1][0] = torch.tensor([-7, 1 << 30])
    assert error(runner, plain, inputs, tactic) < TOLERANCE


def test_whole_steps_are_loaded_without_masks() -> None:
    runner, plain = make((3, 2, 256, 128), "mxfp4")
    inputs = inputs_of(runner, 20)
    launches = [a for a in runner.plan(inputs, EVEN_STEPS) if a.kernel.__name__ == "mx_gemm"]
    assert [launch.meta["TILE"].even for launch in launches] == [True, True]
    assert error(runner, plain, inputs, EVEN_STEPS) < TOLERANCE


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
def test_activations(act: Activation) -> None:
    runner, plain = make((3, 2, 64, 32), "mxfp4", act)
    inputs = inputs_of(runner, 7)
    inputs[0] *= 8  # far enough for the clamps
    assert error(runner, plain, inputs, SMALL) < TOLERANCE


@pytest.mark.parametrize(("fmt", "num_tokens"), [("mxfp4", 1), ("mxfp8", 33)])
def test_the_default_tactic(fmt: str, num_tokens: int) -> None:
    runner, plain = make(SIZES, fmt)
    assert error(runner, plain, inputs_of(runner, num_tokens), -1) < TOLERANCE


def test_weights_stay_as_the_checkpoint_has_them_with_every_power_of_two() -> None:
    """Scales of 2^-20 and 2^20 in one row, either multiplied alone: e4m3 under a scale of the row could not hold them."""
    runner, plain = make((2, 1, 64, 64), "mxfp8", ReLU2(), dtype=torch.bfloat16)
    assert not TritonRunner.needs_prepare(runner.problem)
    assert runner._experts.gate_up is plain.gate_up
    scale = plain.gate_up.scale
    scale[..., 0], scale[..., 1] = 107, 147
    for others in (slice(32, 64), slice(32)):
        inputs = inputs_of(runner, 5)
        inputs[0][:, others] = 0
        assert error(runner, plain, inputs, SMALL) < 5e-3  # the result is rounded to bfloat16


def test_calibrated_scales_of_an_nvfp4_checkpoint_are_not_for_these() -> None:
    """Of which one per expert would make x's rows pairs'."""
    runner, plain = make(SIZES, "mxfp4")
    plain.gate_up_input_scale = runner._experts.gate_up_input_scale = torch.full((4,), 0.01)
    assert error(runner, plain, inputs_of(runner, 9), SMALL) < TOLERANCE


def test_rows_that_are_e4m3_up_to_a_scale_are_quantised_without_error() -> None:
    """By the kernel itself, which its stand-in above replaces for the roundings of Triton's interpreter."""
    data = torch.randint(0, 126, (3, 160), dtype=torch.uint8).view(torch.float8_e4m3fn)
    data.view(torch.uint8)[0, 7] = data.view(torch.uint8)[2, 150] = 126  # 448
    data.view(torch.uint8)[1] = 0
    x, found, scales = data.float() / 64, torch.empty_like(data), torch.zeros(3)
    ids = torch.zeros(3, 2, dtype=torch.int32)
    quantize_fp8[(3,)](x, ids, ids, found, scales, 160, HOW=Recipe(False, False, 2, 0, 4, 128), PDL=False)
    assert scales.tolist() == [1 / 64, 1.0, 1 / 64]
    assert torch.equal(found.view(torch.uint8), data.view(torch.uint8))


@pytest.mark.parametrize("num_tokens", [1, 60, 5000])
def test_candidates_begin_with_the_default_and_all_fit(num_tokens: int) -> None:
    found = choose.worth_measuring(problem(), num_tokens)
    assert found[0] == choose.default(problem(), num_tokens)
    assert sorted(found, key=str) == sorted(fp8_mx.TABLE["fp8"], key=str)
    bound = problem(batch_invariant=True)
    assert choose.worth_measuring(bound, num_tokens) == [choose.default(bound, num_tokens)]


@pytest.mark.parametrize(("capability", "runs"), [((10, 3), True), ((9, 0), False), ((12, 0), False)])
def test_only_powers_of_two_of_blocks_and_e4m3_on_chips_that_multiply_them_take_this_path(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chip, "capability", lambda: capability)
    for fmt in ("mxfp4", "mxfp8"):
        assert (kind_of(problem(fmt)) == "fp8" and choose.default(problem(fmt), 60).path == "fp8_mx") == runs
    assert choose.default(problem("nvfp4"), 60).path != "fp8_mx"
    assert {t.path for t in choose.candidates(replace(problem(), input_format=None), 60)} <= {
        "fused", "chain", "dequantized"}  # fmt: skip


def test_what_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = make(SIZES, "mxfp4")
    with pytest.raises(BackendError, match="no kernels for mxfp4 weights with fp8 activations"):
        runner.forward(inputs_of(runner, 3), choose.FULL)
    large = fp8_mx.tactic(256, Tile(128, 4, 8, 4))
    assert "shared memory" in (choose.why_not(problem(), large, 60) or "")
    assert "tiles of one width" in (choose.why_not(problem(), replace(EVEN_STEPS, split_k=2), 60) or "")
    prepared = replace(problem(dtype=torch.bfloat16), weight_layout="triton-mxfp4-r64c64")
    assert "layout 'checkpoint'" in (TritonRunner._unsupported(prepared) or "")
    monkeypatch.setattr(chip, "capability", lambda: (9, 0))
    assert "10.0" in (choose.why_not(problem(), SMALL, 3) or "")

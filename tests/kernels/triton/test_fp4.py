"""W4A4 as FP4 tensor cores run it, in Triton's interpreter, against the reference's quantised numerics."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.8")  # whose interpreter has dot_scaled

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, TritonRunner, chip, choose
from moestro.kernels.triton.paths import fp4
from moestro.moe import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a chip of another capability is here")
TOLERANCE = 1e-2  # of the relative norm; the interpreter rounds to bfloat16 towards zero
SORTED = fp4.tactic(16, Tile(128, 1, 4, 2))
TWO_WIDTHS = replace(SORTED, pairs2=32, raster_group=4)


@pytest.fixture(autouse=True)
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "capability", lambda: (10, 0))


def make(act: Activation, biases: bool = False, foreign: int = 0, row_groups: int | None = None,
         input_scales: tuple[int, ...] | None = None, **rest: Any) -> TritonRunner:  # fmt: skip
    """A runner of 4 local experts, top 2, hidden 144, intermediate 80."""
    torch.manual_seed(0)
    experts, hidden, inter = 4, 144, 80
    rows = inter * (2 if act.gated else 1)
    scale = None if input_scales is None else torch.full(input_scales, 0.0015)
    weights = SimpleNamespace(
        gate_up=NVFP4.quantize(torch.randn(experts, rows, hidden) * 0.1, row_groups=row_groups),
        down=NVFP4.quantize(torch.randn(experts, hidden, inter) * 0.1),
        gate_up_bias=torch.randn(experts, rows) if biases else None,
        down_bias=torch.randn(experts, hidden) if biases else None,
        gate_up_input_scale=scale,
        down_input_scale=None if scale is None else scale / 4,
    )
    p = MoeProblem(experts + 2 * foreign, experts, foreign, 2, hidden, inter, "nvfp4", act, "nvfp4", **rest)
    assert not TritonRunner.needs_prepare(p)
    return TritonRunner(p, weights)


def inputs_of(num_tokens: int, num_experts: int = 4) -> list[torch.Tensor]:
    x = torch.randn(num_tokens, 144).bfloat16()
    ids = torch.stack([torch.randperm(num_experts)[:2] for _ in range(num_tokens)]).int()
    return [x, ids, torch.rand(num_tokens, 2), torch.full((num_tokens, 144), torch.nan).bfloat16()]


def error(moe: TritonRunner, inputs: list[Any], tactic: Any, x: Any = None) -> float:
    p, n = moe.problem, len(inputs[1])
    moe.use_workspace(torch.full((moe.workspace_bytes(n, tactic),), 0xFF, dtype=torch.uint8))
    moe.forward(inputs, tactic)
    truth = reference.fused_moe(inputs[0] if x is None else x, *inputs[1:3], moe._experts,
                                activation=p.activation, input_format="nvfp4",
                                expert_offset=p.expert_offset)  # fmt: skip
    return float((inputs[3].float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("tactic", [SORTED, TWO_WIDTHS], ids=["one width", "two widths"])
def test_matches_the_reference_on_odd_sizes(tactic: Tactic) -> None:
    """Ragged experts, biases, a scale each for gate and up, experts of other ranks, an id that no rank has."""
    moe = make(SwiGLU(), biases=True, foreign=1, row_groups=2)
    inputs = inputs_of(41, 6)
    inputs[1][inputs[1] == 2] = 3  # nobody comes to local expert 1
    inputs[1][0] = torch.tensor([-7, 1 << 30])
    assert error(moe, inputs, tactic) < TOLERANCE


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
def test_activations(act: Activation) -> None:
    inputs = inputs_of(7)
    inputs[0] *= 8  # far enough for the clamps
    assert error(make(act), inputs, SORTED) < TOLERANCE


@pytest.mark.parametrize("shape", [(), (4,)], ids=["calibrated", "per expert"])
def test_calibrated_input_scales(shape: tuple[int, ...]) -> None:
    assert error(make(SwiGLU(), input_scales=shape), inputs_of(9), SORTED) < TOLERANCE


def test_activations_that_come_quantised_are_read_as_they_are() -> None:
    moe = make(SwiGLU())
    x, ids, weights, out = inputs_of(6)
    q = NVFP4.quantize_rows(x)
    inputs = [q.packed, ids, weights, out, q.scale, q.global_scale]
    assert error(moe, inputs, SORTED, q) < TOLERANCE
    kernels = [launch.kernel.__name__ for launch in moe.plan(inputs, SORTED)]
    assert kernels == ["place", "scaled_gemm", "quantize_rows", "scaled_gemm", "sum_pairs"]


@pytest.mark.parametrize("num_tokens", [1, 33])
def test_the_default_tactic(num_tokens: int) -> None:
    assert error(make(SwiGLU()), inputs_of(num_tokens), -1) < TOLERANCE


def test_candidates_begin_with_the_default_and_all_fit() -> None:
    p = make(SwiGLU()).problem
    for n in (1, 60, 5000):
        found = choose.worth_measuring(p, n)
        assert found[0] == choose.default(p, n)
        assert len(found) == len(fp4.TABLE["nvfp4"])


def test_tactics_of_the_other_path_are_refused_on_either_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make(SwiGLU())
    with pytest.raises(BackendError, match="another path"):
        moe.forward(inputs_of(3), choose.FULL)
    monkeypatch.setattr(chip, "capability", lambda: (9, 0))
    assert "FP4 tensor cores" in (choose.why_not(moe.problem, SORTED, 3) or "")


@pytest.mark.parametrize(("capability", "runs"), [((10, 3), True), ((9, 0), False), ((12, 0), False)])
def test_only_w4a4_on_chips_with_fp4_tensor_cores_takes_this_path(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make(SwiGLU()).problem
    monkeypatch.setattr(chip, "capability", lambda: capability)
    assert chip.multiplies_fp4(p) == runs
    assert not chip.multiplies_fp4(replace(p, input_format=None))

"""INT4 on the CPU: groups, scales' dtypes and zero points on every instruction set, against the float32 reference."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import TACTICS, Case, relative_error, run
from test_correct import ISAS, TOLERANCE

import moestro
from moestro import ExpertWeights
from moestro.errors import FormatError
from moestro.formats import INT4
from moestro.kernels.cpu import CpuRunner, core
from moestro.kernels.cpu.layout import pack
from moestro.kernels.cpu.layout_int4 import PanelINT4

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def drawn(experts: int, rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype) -> INT4:
    """Any codes, zero points up to 16 and scales of the dtype."""
    g = torch.Generator().manual_seed(rows + columns + group)
    packed = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=g)
    scale = ((torch.rand(experts, rows, columns // group, generator=g) + 0.1) * columns**-0.5 / 4).to(dtype)
    zero = torch.randint(0, 17, scale.shape, dtype=torch.uint8, generator=g)
    return INT4.of(packed, scale, None if symmetric else zero)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(core.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize(
    ("group", "symmetric", "dtype"),
    [
        (32, True, BF16),
        (32, False, F16),
        (128, True, F16),
        (128, False, BF16),
        (384, False, F32),
        (192, True, F32),
    ],
)
def test_groups_scales_and_zero_points(isa: str, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    case = Case("int4", 384, 384, experts=3, top_k=2)
    gate_up, down = (drawn(3, rows, 384, group, symmetric, dtype) for rows in (768, 384))
    w = ExpertWeights(gate_up, down)
    for num_tokens in (1, 3, 6, 33):
        call = case.call(num_tokens)
        runner, expected = CpuRunner(case.problem, w), case.expected(call, w)
        errors = {t: relative_error(run(runner, call, t), expected) for t in TACTICS}
        assert max(errors.values()) < TOLERANCE, errors


def test_gate_up_and_down_may_have_groups_of_their_own(isa: str) -> None:
    case = Case("int4", 256, 96, experts=3, top_k=2, biases=False)
    w = ExpertWeights(drawn(3, 192, 256, 128, False, F16), drawn(3, 256, 96, 96, False, F16))
    call = case.call(7)
    assert relative_error(run(CpuRunner(case.problem, w), call), case.expected(call, w)) < TOLERANCE


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("symmetric", "dtype"), [(True, BF16), (False, F16), (False, F32)])
def test_panels_hold_the_same_pieces(gated: bool, symmetric: bool, dtype: torch.dtype) -> None:
    q = drawn(3, 96, 128, 32, symmetric, dtype)
    panels = pack(q, gated)
    assert isinstance(panels, PanelINT4)
    assert (panels.shape, panels.group) == (q.shape, 32)
    back = panels.to_checkpoint()
    assert all(torch.equal(a, b) for a, b in zip(q.pieces, back.pieces, strict=True))
    assert torch.equal(panels.expert(1).dequantize(), q.dequantize()[1])
    assert panels.nbytes == q.nbytes


def test_experts_that_differ_are_named() -> None:
    parts = [drawn(1, 64, 64, 32, symmetric, BF16).expert(0) for symmetric in (True, False)]
    with pytest.raises(FormatError, match="scales and zero points as the first"):
        ExpertWeights.from_experts([(parts[0], parts[0]), (parts[1], parts[1])], "cpu")


def test_from_dense_and_the_operator_take_it() -> None:
    g = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(4, 128, 96, generator=g) / 8, torch.randn(4, 96, 64, generator=g) / 8
    x, ids = torch.randn(5, 96, generator=g).bfloat16(), torch.randint(0, 4, (5, 2), generator=g).int()
    for backend in ("cpu", "portable"):
        w = ExpertWeights.from_dense(gate_up, down, "int4", backend=backend)
        y = moestro.fused_moe(x, ids, torch.ones(5, 2), w, backend=backend)
        want = moestro.reference.fused_moe(x, ids, torch.ones(5, 2), w)
        # the portable backend multiplies in x's dtype: weights are rounded to bf16
        assert relative_error(y, want) < (TOLERANCE if backend == "cpu" else 1e-2)

"""The portable backend against the float32 reference: every tactic, format, activation, mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from moestro import ExpertWeights, SwiGLU, formats, reference
from moestro.errors import BackendError, ShapeError
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.portable import runner as portable
from moestro.kernels.portable.quantize import through
from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import carve, plan_bytes

E, K = 11, 3
TACTICS: list[Any] = [
    ("loop", 1),
    ("pairs", 3),
    ("grouped", 4),
    ("grouped", 0),
    ("masked", 4),
    ("blocks", 16),
]
FORMATS = sorted(formats.FORMATS)
ACTIVATIONS = ["silu", "gelu_tanh", "relu2", SwiGLU(alpha=1.702, limit=0.5, up_shift=1.0)]


@dataclass
class Case:
    """A problem with its weights, and its runner."""

    runner: PortableRunner
    w: ExpertWeights

    @property
    def problem(self) -> MoeProblem:
        return self.runner.problem

    def inputs(self, num_tokens: int, seed: int = 0, experts: list[int] | None = None) -> list[Any]:
        """x, ids (distinct, of `experts` if given), weights, and an output full of NaN."""
        g = torch.Generator().manual_seed(seed)
        p = self.problem
        x = torch.randn(num_tokens, p.hidden_size, generator=g).to(p.dtype)
        pool = torch.tensor(experts if experts is not None else range(p.num_experts), dtype=torch.int32)
        order = torch.rand(num_tokens, len(pool), generator=g).argsort(-1)
        ids = pool[order[:, : p.top_k]]
        weights = torch.rand(num_tokens, p.top_k, generator=g)
        return [x, ids.contiguous(), weights, torch.full_like(x, torch.nan)]

    def reference(self, inputs: list[Any]) -> torch.Tensor:
        x, ids, weights, _, *scales = inputs
        p = self.problem
        return reference.fused_moe(
            NVFP4(x, *scales) if scales else x,
            ids,
            weights,
            self.w,
            activation=p.activation,
            input_format=p.input_format,
            expert_offset=p.expert_offset,
        )

    def error(self, inputs: list[Any], tactic: Any) -> float:
        """Relative error norm, in a poisoned workspace of exactly the bytes asked for."""
        num_tokens = inputs[0].shape[0]
        nbytes = self.runner.workspace_bytes(num_tokens, tactic)
        self.runner.use_workspace(torch.full((nbytes,), 0xFF, dtype=torch.uint8))
        out = self.runner.forward(inputs, tactic)
        assert out is inputs[3]
        assert not torch.isnan(out).any()
        expected = self.reference(inputs)
        return float((out - expected).norm() / expected.norm().clamp(min=1e-12))


def make(
    fmt: str = "bf16",
    activation: str | Activation = "silu",
    *,
    dtype: torch.dtype = torch.bfloat16,
    offset: int = 0,
    local: int | None = None,
    bias: bool = False,
    scales: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case of E experts (those from offset to 3 before the last, if there is an offset)."""
    g = torch.Generator().manual_seed(seed)
    hidden, inter = (96, 160) if formats.get(fmt).block == 32 else (48, 80)
    act = resolve_activation(activation)
    held = local or (E - offset - 3 if offset else E)
    rows = 2 * inter if act.gated else inter

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.2

    dense_dtype = dtype if fmt == "bf16" else torch.float32
    scale_shape = {"one": (), "each": (held,)}.get(scales or "")
    w = ExpertWeights.from_dense(
        randn(held, rows, hidden).to(dense_dtype),
        randn(held, hidden, inter).to(dense_dtype),
        fmt,
        gate_up_bias=randn(held, rows) if bias else None,
        down_bias=randn(held, hidden).bfloat16() if bias else None,
        gate_up_input_scale=None if scale_shape is None else torch.full(scale_shape, 2e-3),
        down_input_scale=None if scale_shape is None else torch.full(scale_shape, 1e-3),
    )
    problem = MoeProblem(
        num_experts=E,
        num_local_experts=held,
        expert_offset=offset,
        top_k=K,
        hidden_size=hidden,
        intermediate_size=inter,
        weight_format=fmt,
        activation=act,
        dtype=dtype,
        weight_dtype=w.dense_dtype,
        biased=w.biased,
        **options,
    )
    return Case(PortableRunner(problem, w), w)


def fits(case: Case, tactic: Any, num_tokens: int) -> bool:
    return case.runner.unfit(tactic, num_tokens) is None


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_equals_the_reference_in_bf16(tactic: Any, fmt: str, activation: Any, offset: int) -> None:
    for deterministic in (False, True):
        case = make(fmt, activation, offset=offset, deterministic=deterministic)
        if not fits(case, tactic, 5):
            assert tactic == ("grouped", 0)
            assert fmt != "bf16"
            return
        assert case.error(case.inputs(5), tactic) < 1e-2


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_equals_the_reference_in_float32(tactic: Any, fmt: str, offset: int) -> None:
    for activation in ACTIVATIONS:
        case = make(fmt, activation, offset=offset, dtype=torch.float32, bias=True)
        if fits(case, tactic, 33):
            assert case.error(case.inputs(33), tactic) < 1e-5


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
@pytest.mark.parametrize("tactic", [-1, *TACTICS], ids=str)
def test_any_number_of_tokens(tactic: Any, fmt: str) -> None:
    case = make(fmt)
    for num_tokens in (1, 2, 3, 16, 17, 64, 100, 257):
        if tactic == -1 or fits(case, tactic, num_tokens):
            assert case.error(case.inputs(num_tokens, seed=num_tokens), tactic) < 1e-2


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 257), st.integers(0, E - 1), st.integers(0, 5), st.sampled_from([-1, *TACTICS]))
def test_any_size_offset_and_routing(num_tokens: int, offset: int, seed: int, tactic: Any) -> None:
    case = make(offset=offset, local=min(4, E - offset), seed=seed)
    if tactic == -1 or fits(case, tactic, num_tokens):
        assert case.error(case.inputs(num_tokens, seed=seed), tactic) < 1e-2


@pytest.mark.parametrize("tactic", [-1, *TACTICS], ids=str)
def test_no_tokens_leave_an_empty_output(tactic: Any) -> None:
    case = make()
    inputs = case.inputs(0)
    assert case.runner.forward(inputs, tactic) is inputs[3]


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_experts_without_tokens_and_one_with_all(tactic: Any) -> None:
    case = make()
    assert case.error(case.inputs(40, experts=[0, 6, 10]), tactic) < 1e-2


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_ids_out_of_range_contribute_nothing_whatever_their_weight(tactic: Any) -> None:
    case = make(offset=2, bias=True)
    x, ids, weights, out = case.inputs(20)
    ids[::2, 0], ids[1::2, 1], ids[3, 2] = -1, E, 2**31 - 1
    ids[5] = torch.tensor([-(2**31), 0, E + 5])  # a token without any expert of this rank
    foreign = (ids < 2) | (ids >= 2 + case.problem.num_local_experts)
    poisoned = weights.masked_fill(foreign, torch.nan)
    assert case.runner.forward([x, ids, poisoned, out], tactic) is out
    expected = case.reference([x, ids, weights, out])
    assert float((out - expected).norm() / expected.norm()) < 1e-2
    assert out[5].abs().max() == 0


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_a_token_may_name_an_expert_twice(tactic: Any) -> None:
    case = make(dtype=torch.float32)
    inputs = case.inputs(9)
    inputs[1][:, 1] = inputs[1][:, 0]
    assert case.error(inputs, tactic) < 1e-5


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "fp8_block"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_biases_count(tactic: Any, fmt: str) -> None:
    case = make(fmt, ACTIVATIONS[3], bias=True, offset=2)
    if fits(case, tactic, 17):
        assert case.error(case.inputs(17), tactic) < 1e-2


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_float16(tactic: Any, fmt: str) -> None:
    case = make(fmt, dtype=torch.float16)
    if fits(case, tactic, 17):
        assert case.error(case.inputs(17), tactic) < 2e-3


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_dense_weights_of_another_dtype_lose_nothing(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = make(dtype=x_dtype)
    dense = [t.to(weight_dtype) for t in case.w.dequantize()]
    w = ExpertWeights.from_dense(*dense, "bf16")
    problem = MoeProblem(**{**vars(case.problem), "weight_dtype": weight_dtype})
    other = Case(PortableRunner(problem, w), w)
    for tactic in TACTICS:
        if fits(other, tactic, 17):
            assert other.error(other.inputs(17), tactic) < 5e-3


@pytest.mark.parametrize("scales", [None, "one", "each"])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_quantised_activations(tactic: Any, scales: str | None) -> None:
    for fmt in ("bf16", "nvfp4"):
        case = make(fmt, input_format="nvfp4", scales=scales, offset=2, bias=True)
        if fits(case, tactic, 33):
            assert case.error(case.inputs(33), tactic) < 1e-2
        exact = make(fmt, input_format="nvfp4", scales=scales, dtype=torch.float32)
        if fits(exact, tactic, 33):
            assert exact.error(exact.inputs(33), tactic) < 1e-5


@pytest.mark.parametrize("input_format", ["fp8", "int8"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_eight_bit_activations_equal_their_reference(tactic: Any, fmt: str, input_format: str) -> None:
    """Exactly but for the order of sums: float32 throughout, biases and a limit included."""
    case = make(fmt, ACTIVATIONS[3], dtype=torch.float32, bias=True, offset=2, input_format=input_format)
    inputs = case.inputs(17)
    inputs[0][3] = 0  # a token of zeros has no scale
    if fits(case, tactic, 17):
        assert case.error(inputs, tactic) < 1e-5


def test_eight_bit_activations_are_rounded_as_written_down() -> None:
    """By hand, in float64, on columns that are no multiple of a block."""
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).float()
    rows[1] *= 1e-30
    for kind, most, width in (("int8", 127.0, 32), ("fp8", 448.0, 300), ("fp8", 448.0, 128)):
        fmt = "fp8_block" if width == 128 else "nvfp4"
        problem = MoeProblem(E, E, 0, K, 300, 300, fmt, input_format=kind)
        for first in range(0, 300, width):
            part = rows[:, first : first + width]
            scale = (part.abs().amax(1, keepdim=True) / torch.tensor(most)).double()
            codes = part.double() / scale
            rounded = codes.round() if kind == "int8" else codes.float().to(torch.float8_e4m3fn).double()
            found = through(problem, rows, None)[:, first : first + width]
            torch.testing.assert_close(found, (rounded * scale).float(), rtol=3e-7, atol=0)
        assert torch.equal(through(problem, rows, None), reference.through(
            rows, kind, fp8_columns=128 if width == 128 else None
        ))  # fmt: skip


@pytest.mark.parametrize(("input_format", "low", "high"), [("fp8", 0.01, 0.06), ("int8", 0.004, 0.03)])
def test_eight_bit_activations_cost_what_is_written_down(input_format: str, low: float, high: float) -> None:
    case, plain = make("nvfp4", input_format=input_format), make("nvfp4")
    inputs = case.inputs(64)
    a, b = case.reference(inputs), plain.reference(inputs)
    assert low < float((a - b).norm() / b.norm()) < high


def test_weights_folded_to_e4m3_are_within_their_rounding() -> None:
    case = make("nvfp4")
    inputs = case.inputs(64)
    exact = case.reference(inputs)
    folded = reference.fused_moe(*inputs[:3], case.w, weight_rounding="e4m3")
    assert 0.005 < float((folded - exact).norm() / exact.norm()) < 0.06
    mxfp4 = make("mxfp4").w.gate_up.expert(0)  # one power of two apart at most here: folds exactly
    assert torch.equal(reference.fold_e4m3(mxfp4), mxfp4.dequantize())


def test_quantised_activations_differ_from_unquantised_ones() -> None:
    """What the test above would not see if input_format did nothing."""
    case, plain = make(input_format="nvfp4"), make()
    inputs = case.inputs(33)
    a, b = case.reference(inputs), plain.reference(inputs)
    assert 0.05 < float((a - b).norm() / b.norm()) < 0.5


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_activations_that_come_quantised(tactic: Any) -> None:
    case = make("nvfp4", input_format="nvfp4")
    x, ids, weights, out = case.inputs(17)
    q = NVFP4.quantize_rows(x)
    if fits(case, tactic, 17):
        assert case.error([q.packed, ids, weights, out, q.scale, q.global_scale], tactic) < 1e-2


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_deterministic_is_bitwise_repeatable(tactic: Any) -> None:
    case = make(deterministic=True)
    first, second = case.inputs(64), case.inputs(64)
    assert torch.equal(case.runner.forward(first, tactic), case.runner.forward(second, tactic))


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_never_dequantises_more_experts_than_its_knob(tactic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("nvfp4")
    if not fits(case, tactic, 40):
        assert tactic == ("grouped", 0)
        return
    inputs, seen = case.inputs(40), []
    dequantize = NVFP4.dequantize

    def spy(self: NVFP4, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(self.shape[0] if len(self.shape) == 3 else 1)
        return dequantize(self, *args, **kwargs)

    monkeypatch.setattr(NVFP4, "dequantize", spy)
    case.runner.forward(inputs, tactic)
    assert 1 <= max(seen) <= tactic[1]


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_tactics_for_a_cuda_graph_never_wait_for_the_device(tactic: Any) -> None:
    """On fake tensors whatever reads a value back raises."""
    case = make()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(t) for t in case.inputs(7)]
    graph = make(cuda_graph=True)
    with mode:
        if fits(graph, tactic, 7):
            assert case.runner.forward(inputs, tactic).shape == inputs[3].shape
        else:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                case.runner.forward(inputs, tactic)


def test_the_tactics_listed_fit_and_are_worth_trying() -> None:
    def listed(case: Case, num_tokens: int) -> set[str]:
        tactics = case.runner.get_valid_tactics(case.inputs(num_tokens), None)
        assert all(fits(case, tactic, num_tokens) for tactic in tactics)
        return {name for name, _ in tactics}

    for fmt in ("bf16", "nvfp4"):
        assert listed(make(fmt), 9) == {"loop", "pairs", "grouped"}
        assert listed(make(fmt), 64) == {"loop", "grouped"}  # pairs would read experts again and again
    assert listed(make("nvfp4", cuda_graph=True), 2) == {"pairs", "masked"}
    assert listed(make("bf16", cuda_graph=True), 64) == {"grouped", "masked"}
    many = make("nvfp4")  # a chunk of 128 experts would mostly be ones that two tokens do not need
    many.runner.problem = replace(many.problem, num_local_experts=128)
    assert listed(many, 2) == {"loop", "pairs"}


@pytest.mark.parametrize(
    "tactic", ["pairz", ("loop",), ("pairs", 0), ("grouped", -1), 7, ("grouped", 1.5), None]
)
def test_an_unknown_tactic_is_an_error(tactic: Any) -> None:
    case = make()
    with pytest.raises(BackendError, match="tactic"):
        case.runner.forward(case.inputs(2), tactic)


def test_a_tactic_that_does_not_fit_is_an_error_with_its_reason() -> None:
    case = make("nvfp4")
    with pytest.raises(BackendError, match="at most 256 pairs"):
        case.runner.forward(case.inputs(100), "pairs")
    with pytest.raises(BackendError, match="dense copy of all"):
        case.runner.forward(case.inputs(2), ("grouped", 0))


def test_copies_of_experts_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = 2 * 80 * 48 * 2  # bytes of gate_up in bf16
    monkeypatch.setattr(portable, "COPY_BYTES", 3 * expert)
    dense, quantised = make("bf16").runner, make("nvfp4").runner
    for name in ("pairs", "masked"):
        assert dense.unfit((name, 3), 2) is None
        assert "dense copies of 4 experts" in (dense.unfit((name, 4), 2) or "")
    assert dense.unfit(("grouped", 4), 2) is None  # reads them where they are
    assert "dense copies of 4 experts" in (quantised.unfit(("grouped", 4), 2) or "")
    monkeypatch.setattr(portable, "COPY_BYTES", 1)
    assert quantised.unfit(("pairs", 1), 2) is None  # one expert at a time always goes


def test_a_tactic_can_be_named_without_its_knob() -> None:
    case = make()
    for name in ("loop", "pairs", "grouped", "masked"):
        assert case.error(case.inputs(9), name) < 1e-2


def test_a_workspace_that_is_too_small_is_an_error() -> None:
    case = make()
    nbytes = case.runner.workspace_bytes(9, "loop")
    case.runner.use_workspace(torch.empty(nbytes - 1, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=f"at least {nbytes} bytes, got {nbytes - 1}"):
        case.runner.forward(case.inputs(9), "loop")


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(
            st.tuples(st.integers(0, 5), st.integers(0, 300)),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        ),
    )
)
def test_scratch_tensors_are_aligned_and_do_not_overlap(plan: dict[str, Any]) -> None:
    buffer = torch.zeros(plan_bytes(plan), dtype=torch.uint8)
    tensors = carve(plan, buffer, buffer.device)
    for value, (name, (shape, dtype)) in enumerate(plan.items(), start=1):
        assert (tuple(tensors[name].shape), tensors[name].dtype) == (shape, dtype)
        assert tensors[name].numel() == 0 or (tensors[name].data_ptr() - buffer.data_ptr()) % 256 == 0
        tensors[name].fill_(value)
    for value, name in enumerate(plan, start=1):
        assert bool((tensors[name] == value).all())

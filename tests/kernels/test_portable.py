"""The portable backend against the float32 reference: every tactic, format, activation, mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from portable_cases import ACTIVATIONS, FORMATS, TACTICS, Case, E, fits, make
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from moestro import ExpertWeights
from moestro.errors import BackendError, ShapeError
from moestro.formats import NVFP4
from moestro.kernels.portable import runner as portable
from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import carve, plan_bytes


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

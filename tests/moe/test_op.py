"""fused_moe: every keyword, on any backend that this machine has, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import E, H, I, K, error, make_call, make_weights

import moestro
from moestro import ExpertWeights, SwiGLU, errors, formats, fused_moe
from moestro.formats import BF16, NVFP4
from moestro.kernels import backends
from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.problem import MoeProblem
from moestro.moe.options import Options, make_problem

FORMATS = sorted(formats.FORMATS)
HERE = [
    name
    for name in ("auto", *backends.BACKENDS)
    if name == "auto"
    or backends.why_not(name, make_problem(make_weights("bf16"), Options(), top_k=K, dtype=torch.bfloat16))
    is None
]


@pytest.mark.parametrize("fmt", FORMATS)
def test_equals_the_reference_for_any_number_of_tokens(fmt: str) -> None:
    w = make_weights(fmt)
    for num_tokens in (1, 2, 17, 64, 257):
        call = make_call(num_tokens, hidden=w.hidden_size)
        assert error(fused_moe(*call, w), *call, w) < 1e-2


@pytest.mark.parametrize("backend", HERE)
def test_backends_agree_with_the_reference(backend: str) -> None:
    w, call = make_weights("nvfp4"), make_call(33)
    assert error(fused_moe(*call, w, backend=backend), *call, w) < 1e-2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, E), st.integers(0, E - 1), st.booleans(), st.integers(0, 9))
def test_any_shape(num_tokens: int, top_k: int, offset: int, deterministic: bool, seed: int) -> None:
    w = make_weights("bf16", experts=E - offset)
    call = make_call(num_tokens, top_k=top_k, seed=seed)
    y = fused_moe(*call, w, expert_offset=offset, num_experts=E, deterministic=deterministic)
    assert y.shape == (num_tokens, H)
    assert error(y, *call, w, expert_offset=offset) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_the_result_has_the_dtype_of_x(fmt: str, dtype: torch.dtype) -> None:
    w, call = make_weights(fmt), make_call(17, dtype=dtype)
    y = fused_moe(*call, w)
    assert y.dtype == dtype
    assert error(y, *call, w) < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize(
    "activation", ["silu", "gelu_tanh", "relu2", SwiGLU(alpha=1.702, limit=0.5, up_shift=1.0)], ids=str
)
def test_activations_and_biases(activation: Any) -> None:
    gated = activation != "relu2"
    bias = {"gate_up_bias": torch.full((E, 2 * I if gated else I), 0.1), "down_bias": torch.full((E, H), 0.2)}
    w, call = make_weights("nvfp4", gated=gated, **bias), make_call(17)
    assert error(fused_moe(*call, w, activation=activation), *call, w, activation=activation) < 1e-2


def test_ranks_sum_to_the_whole() -> None:
    w, call = make_weights("bf16", dtype=torch.float32), make_call(33, dtype=torch.float32)
    gate_up, down = w.dequantize()
    parts = [
        fused_moe(
            *call, ExpertWeights.from_dense(gate_up[a:b], down[a:b], "bf16"), expert_offset=a, num_experts=E
        )
        for a, b in ((0, 2), (2, 3), (3, E))
    ]
    torch.testing.assert_close(sum(parts), fused_moe(*call, w), rtol=1e-5, atol=1e-5)


def test_quantised_activations() -> None:
    w, call = make_weights("nvfp4"), make_call(33)
    y = fused_moe(*call, w, input_format="nvfp4")
    assert error(y, *call, w, input_format="nvfp4") < 1e-2
    assert error(y, *call, w) > 0.05


@pytest.mark.parametrize("groups", ["per token", "one"])
def test_activations_that_come_quantised_give_bf16(groups: str) -> None:
    w, (x, ids, weights) = make_weights("nvfp4"), make_call(33)
    q = NVFP4.quantize_rows(x) if groups == "per token" else NVFP4.quantize(x)
    y = fused_moe(q, ids, weights, w)
    assert y.dtype == torch.bfloat16
    assert error(y, q, ids, weights, w) < 1e-2


def test_int64_ids_are_not_wrapped_into_range() -> None:
    w, (x, ids, weights) = make_weights("bf16"), make_call(9)
    assert torch.equal(fused_moe(x, ids.long(), weights, w), fused_moe(x, ids, weights, w))
    assert not fused_moe(x, ids.long() + 2**32, weights, w).any()
    assert not fused_moe(x, ids.long() - 2**32, weights, w).any()


def test_out_is_written_in_place_whatever_it_held() -> None:
    w, call = make_weights("nvfp4"), make_call(9)
    out = torch.full((9, H), torch.nan, dtype=torch.bfloat16)
    assert fused_moe(*call, w, out=out) is out
    assert torch.equal(out, fused_moe(*call, w))


def test_no_tokens() -> None:
    out = torch.empty(0, H, dtype=torch.bfloat16)
    assert fused_moe(*make_call(0), make_weights(), out=out) is out


def test_deterministic_repeats_bit_by_bit() -> None:
    w, call = make_weights("nvfp4"), make_call(64)
    assert torch.equal(fused_moe(*call, w, deterministic=True), fused_moe(*call, w, deterministic=True))


def test_a_tactic_can_be_given() -> None:
    w, call = make_weights("nvfp4"), make_call(9)
    for tactic in ("loop", ("pairs", 4), ("grouped", 2), ("masked", 3)):
        assert error(fused_moe(*call, w, backend="portable", tactic=tactic), *call, w) < 1e-2


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    w = make_weights("bf16")
    calls = [make_call(20, seed=seed) for seed in range(16)]
    alone = [fused_moe(*call, w) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: fused_moe(*call, w), calls))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


class TestDebugChecks:
    """Values of ids are looked at only here."""

    @pytest.mark.parametrize("bad", [-1, E])
    def test_ids_out_of_range_raise_inside_only(self, bad: int) -> None:
        w, (x, ids, weights) = make_weights(), make_call(3)
        ids[1, 2] = bad
        fused_moe(x, ids, weights, w)
        with (
            moestro.debug_checks(),
            pytest.raises(errors.RoutingError, match=f"below num_experts={E}.*{bad}"),
        ):
            fused_moe(x, ids, weights, w)
        fused_moe(x, ids, weights, w)

    def test_ids_of_other_ranks_are_in_range(self) -> None:
        with moestro.debug_checks():
            fused_moe(*make_call(3), make_weights(experts=2), num_experts=E)
            fused_moe(*make_call(3), make_weights(experts=2), expert_offset=3)

    def test_empty_ids_are_fine(self) -> None:
        with moestro.debug_checks():
            fused_moe(*make_call(0), make_weights())


def strided_scales(x: torch.Tensor) -> NVFP4:
    q = NVFP4.quantize_rows(x)
    return NVFP4(
        q.packed, q.scale.view(torch.uint8).T.contiguous().T.view(torch.float8_e4m3fn), q.global_scale
    )


def bad_calls() -> dict[str, tuple[type[Exception], str, Any]]:
    """name -> (error, message, call(x, ids, weights, w))."""
    f = fused_moe
    return {
        "x of rank 1": (
            errors.ShapeError,
            r"x must be \[N, H\].*\[48\]",
            lambda x, i, t, w: f(x[0], i, t, w),
        ),
        "x of another H": (errors.ShapeError, "H=48", lambda x, i, t, w: f(x[:, :32].contiguous(), i, t, w)),
        "x in float64": (errors.DTypeError, "x must be.*float64", lambda x, i, t, w: f(x.double(), i, t, w)),
        "x an int": (
            errors.DTypeError,
            "x must be a torch.Tensor, got int",
            lambda x, i, t, w: f(3, i, t, w),
        ),
        "x elsewhere": (
            errors.DeviceError,
            "x must be on cpu.*meta",
            lambda x, i, t, w: f(x.to("meta"), i, t, w),
        ),
        "x with strides": (
            errors.ShapeError,
            "x must be contiguous",
            lambda x, i, t, w: f(x.T.contiguous().T, i, t, w),
        ),
        "ids a list": (
            errors.DTypeError,
            "ids must be a torch.Tensor, got list",
            lambda x, i, t, w: f(x, [[1]], t, w),
        ),
        "ids in int16": (errors.DTypeError, "ids must be.*int16", lambda x, i, t, w: f(x, i.short(), t, w)),
        "ids of rank 1": (
            errors.ShapeError,
            "ids must be",
            lambda x, i, t, w: f(x, i[:, 0].contiguous(), t, w),
        ),
        "ids of other tokens": (errors.ShapeError, "N=4", lambda x, i, t, w: f(x, i[:2], t[:2], w)),
        "ids elsewhere": (errors.DeviceError, "ids must be on", lambda x, i, t, w: f(x, i.to("meta"), t, w)),
        "ids with strides": (
            errors.ShapeError,
            "ids must be contiguous",
            lambda x, i, t, w: f(x, i.T.contiguous().T, t, w),
        ),
        "ids without experts": (
            errors.RoutingError,
            "top_k >= 1",
            lambda x, i, t, w: f(x, i[:, :0], t[:, :0], w),
        ),
        "weights in bf16": (
            errors.DTypeError,
            r"weights must be torch.float32.*weights.float\(\)",
            lambda x, i, t, w: f(x, i, t.bfloat16(), w),
        ),
        "weights of another K": (
            errors.ShapeError,
            "weights must have ids' shape",
            lambda x, i, t, w: f(x, i, t[:, :2], w),
        ),
        "top_k above E": (
            errors.RoutingError,
            "top_k must be at most the number of experts 7, got 9",
            lambda x, i, t, w: f(x, i.repeat(1, 3), t.repeat(1, 3), w),
        ),
        "w dense": (errors.DTypeError, "w must be a moestro.ExpertWeights", lambda x, i, t, w: f(x, i, t, x)),
        "x quantised with strides": (
            errors.ShapeError,
            r"x\.scale must be contiguous",
            lambda x, i, t, w: f(strided_scales(x), i, t, w),
        ),
        "out of another shape": (
            errors.ShapeError,
            "out must have x's shape",
            lambda x, i, t, w: f(x, i, t, w, out=x[:2]),
        ),
        "out of another dtype": (
            errors.DTypeError,
            "out must be",
            lambda x, i, t, w: f(x, i, t, w, out=x.float()),
        ),
        "out elsewhere": (
            errors.DeviceError,
            "out must be on",
            lambda x, i, t, w: f(x, i, t, w, out=x.to("meta")),
        ),
        "out with strides": (
            errors.ShapeError,
            "out must be contiguous",
            lambda x, i, t, w: f(x, i, t, w, out=x.T.contiguous().T),
        ),
        "out over x": (errors.ShapeError, "out must not overlap x", lambda x, i, t, w: f(x, i, t, w, out=x)),
        "out not a tensor": (
            errors.DTypeError,
            "out must be a torch.Tensor",
            lambda x, i, t, w: f(x, i, t, w, out=1),
        ),
        "an unknown activation": (
            errors.BackendError,
            "activation 'sillu'; did you mean 'silu'",
            lambda x, i, t, w: f(x, i, t, w, activation="sillu"),
        ),
        "a number as activation": (
            errors.BackendError,
            "activation must be",
            lambda x, i, t, w: f(x, i, t, w, activation=3),
        ),
        "an activation without gate": (
            errors.ShapeError,
            r"activation 'relu2' must have gate_up.*\[L, I, H\]",
            lambda x, i, t, w: f(x, i, t, w, activation="relu2"),
        ),
        "an unknown input format": (
            errors.FormatError,
            "did you mean 'nvfp4'",
            lambda x, i, t, w: f(x, i, t, w, input_format="nvfp"),
        ),
        "an unknown backend": (
            errors.BackendError,
            "backend 'portabel'; did you mean 'portable'",
            lambda x, i, t, w: f(x, i, t, w, backend="portabel"),
        ),
        "a number as backend": (
            errors.BackendError,
            "backend must be a name",
            lambda x, i, t, w: f(x, i, t, w, backend=3),
        ),
        "an unknown tactic": (
            errors.BackendError,
            "tactic 'lop'; did you mean 'loop'",
            lambda x, i, t, w: f(x, i, t, w, backend="portable", tactic="lop"),
        ),
        "a list as tactic": (
            errors.BackendError,
            "tactic must be hashable",
            lambda x, i, t, w: f(x, i, t, w, tactic=["loop"]),
        ),
        "a negative offset": (
            errors.RoutingError,
            "expert_offset must be",
            lambda x, i, t, w: f(x, i, t, w, expert_offset=-1),
        ),
        "too few num_experts": (
            errors.RoutingError,
            "num_experts must be.*at least 9",
            lambda x, i, t, w: f(x, i, t, w, expert_offset=2, num_experts=8),
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_named_before_any_work(name: str) -> None:
    kind, message, call = bad_calls()[name]
    w, (x, ids, weights) = make_weights(), make_call(4)
    with pytest.raises(kind, match=message) as caught:
        call(x, ids, weights, w)
    assert isinstance(caught.value, errors.MoestroError)


def test_w4a4_needs_sizes_of_whole_blocks() -> None:
    w = ExpertWeights.from_dense(torch.zeros(E, 40, 24), torch.zeros(E, 24, 20), "bf16")
    x, ids, weights = make_call(2, hidden=24)
    assert fused_moe(x, ids, weights, w).shape == (2, 24)
    with pytest.raises(errors.ShapeError, match="hidden_size divisible by 16, got 24"):
        fused_moe(x, ids, weights, w, input_format="nvfp4")


def test_weights_are_repacked_once_for_a_backend_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Repacking(PortableRunner):
        repacked = 0

        @classmethod
        def needs_prepare(cls, problem: MoeProblem) -> bool:
            return True

        @classmethod
        def prepare(cls, problem: MoeProblem, experts: Any, *, donate: bool = False) -> Any:
            cls.repacked += 1
            return BF16(experts.gate_up.data.clone()), BF16(experts.down.data.clone())

    monkeypatch.setitem(backends.BACKENDS, "portable", lambda: Repacking)
    backends._load.cache_clear()
    try:
        w, call = make_weights("bf16"), make_call(9)
        for deterministic in (False, True):
            y = fused_moe(*call, w, backend="portable", deterministic=deterministic)
            assert error(y, *call, w) < 1e-2
        assert Repacking.repacked == 1
    finally:
        backends._load.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("name", ["ids", "weights"])
def test_an_out_over_the_routing_is_refused(name: str, backend: str) -> None:
    x, ids, weights = make_call(5, dtype=torch.float32)
    memory = torch.zeros_like(x)
    given = {"ids": ids, "weights": weights}
    read = memory.view(-1)[: ids.numel()].view(given[name].dtype).view(ids.shape)
    read.copy_(given[name])
    given[name] = read
    with pytest.raises(errors.ShapeError, match=f"out must not overlap {name}"):
        fused_moe(x, given["ids"], given["weights"], make_weights(), out=memory, backend=backend)

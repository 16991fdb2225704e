"""Batch invariance: a token's result has the same bits whatever N, the other tokens, its place and the chunking."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import ExpertWeights, FusedMoE, SwiGLU, errors, fused_moe, reference
from moestro.kernels import backends
from moestro.kernels.portable import invariant
from moestro.kernels.portable.steady import steady_sigmoid
from moestro.moe.options import Options, make_problem

E, K, TOKENS = 9, 3, 40
KINDS: list[tuple[str, torch.dtype, str | None]] = [
    ("bf16", torch.bfloat16, None),
    ("bf16", torch.float32, None),
    ("nvfp4", torch.bfloat16, None),
    ("nvfp4", torch.float16, "nvfp4"),
    ("mxfp4", torch.float32, "fp8"),
    ("fp8_block", torch.bfloat16, "fp8"),
    ("nvfp4", torch.bfloat16, "int8"),
]


@functools.cache
def weights_of(fmt: str, dtype: torch.dtype) -> ExpertWeights:
    """Odd sizes, so that a row's end falls within a vector."""
    g = torch.Generator().manual_seed(0)
    hidden, inter = (96, 160) if fmt == "mxfp4" else (208, 144)
    dense = dtype if fmt == "bf16" else torch.float32
    gate_up, down = (
        (torch.randn(E, *shape, generator=g) * 0.2).to(dense)
        for shape in ((2 * inter, hidden), (hidden, inter))
    )
    return ExpertWeights.from_dense(gate_up, down, fmt, gate_up_bias=torch.randn(E, 2 * inter, generator=g))


@functools.cache
def case(kind: tuple[str, torch.dtype, str | None]) -> tuple[Any, ...]:
    """x, ids, weights, and each token's result when it is alone."""
    fmt, dtype, input_format = kind
    w, g = weights_of(fmt, dtype), torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, w.hidden_size, generator=g).to(dtype)
    ids = torch.rand(TOKENS, E, generator=g).argsort(-1)[:, :K].int().contiguous()
    ids[0] = ids[0, 0]  # a token may name an expert more than once
    weights = torch.rand(TOKENS, K, generator=g)

    def call(n: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {
            "backend": "portable",
            "input_format": input_format,
            "batch_invariant": True,
        }
        return fused_moe(x[n], ids[n], weights[n], w, **options)

    return call, torch.cat([call(torch.tensor([n])) for n in range(TOKENS)]), (x, ids, weights, w)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=3 * TOKENS))
def test_a_rows_bits_do_not_depend_on_the_batch(kind: Any, tokens: list[int]) -> None:
    """Any tokens, in any order and as often as you like: other neighbours, other loads, another place."""
    call, alone, _ = case(kind)
    n = torch.tensor(tokens)
    assert torch.equal(call(n), alone[n])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_invariant_results_are_right(kind: Any) -> None:
    _, alone, (x, ids, weights, w) = case(kind)
    expected = reference.fused_moe(x, ids, weights, w, input_format=kind[2])
    assert float((alone.float() - expected).norm() / expected.norm()) < 1e-2


def test_other_tactics_would_not_do() -> None:
    """What the tests above would not see if every product were invariant here anyway."""
    problem = make_problem(
        weights_of("bf16", torch.bfloat16), Options(batch_invariant=True), top_k=K, dtype=torch.bfloat16
    )
    runner = backends.load("portable")(problem, weights_of("bf16", torch.bfloat16))
    inputs = [torch.empty(4, 208)] * 4
    assert runner.get_valid_tactics(inputs, None) == [("blocks", 16)]
    with pytest.raises(errors.BackendError, match="depend on the batch"):
        runner.check_tactic(inputs, "loop")
    assert problem.deterministic


def test_one_backend_serves_all_sizes() -> None:
    """Two backends sum in different orders: the tuner must not take one for some sizes, another for others."""
    layer = FusedMoE(weights_of("nvfp4", torch.bfloat16), K, 64, batch_invariant=True)
    assert len(layer.runners) == 1


def test_rows_go_one_by_one_where_a_product_depends_on_the_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mm = torch.mm

    def crooked(a: torch.Tensor, b: torch.Tensor, **out: Any) -> torch.Tensor:
        return mm(a * (1 + torch.arange(len(a))[:, None] * 1e-3), b, **out)

    invariant.rows_of_block.cache_clear()
    monkeypatch.setattr(torch, "mm", crooked)
    assert invariant.rows_of_block(torch.device("cpu"), torch.float32, 24, 40, 1) == 1
    assert "depends on a row's place" in caplog.text
    monkeypatch.undo()
    invariant.rows_of_block.cache_clear()
    assert invariant.rows_of_block(torch.device("cpu"), torch.float32, 24, 40, 1) in (1, invariant.ROWS)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", SwiGLU(1.702, 0.5, 1.0)], ids=str)
def test_activations_with_the_steady_sigmoid_are_the_same_functions(activation: Any) -> None:
    from moestro.kernels.activations import resolve_activation

    act: Any = resolve_activation(activation)
    h = torch.linspace(-120, 120, 40_000).view(100, 400)
    torch.testing.assert_close(act.apply(h, steady_sigmoid), act(h.double()).float(), rtol=2e-5, atol=1e-6)


def test_the_steady_sigmoid_is_right_everywhere_and_alike_in_every_place() -> None:
    x = torch.cat([torch.linspace(-100, 100, 100_003), torch.tensor([-torch.inf, torch.inf, 0.0, -1e30])])
    torch.testing.assert_close(steady_sigmoid(x), torch.sigmoid(x.double()).float(), rtol=3e-7, atol=1e-37)
    assert steady_sigmoid(torch.tensor([torch.nan])).isnan().all()
    some = x[12_345]
    for size in range(1, 70):
        assert (steady_sigmoid(some.repeat(size)) == steady_sigmoid(some)).all()

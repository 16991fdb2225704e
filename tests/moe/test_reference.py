"""The reference against one-line formulas of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from moe_cases import E, H, I, make_call, make_weights

from moestro import errors, reference
from moestro.formats import NVFP4


def test_equals_the_dense_formula_in_float64() -> None:
    w = make_weights("bf16", dtype=torch.float32)
    x, ids, weights = make_call(9, dtype=torch.float32)
    gate_up, down = w.dequantize(torch.float64)
    h = torch.einsum("erh,nh->ner", gate_up, x.double())
    a = F.silu(h[..., :I]) * h[..., I:]
    every = torch.einsum("ehi,nei->neh", down, a)  # [N, E, H]: each token through each expert
    route = torch.zeros(9, E, dtype=torch.float64).scatter_add_(1, ids.long(), weights.double())
    expected = torch.einsum("ne,neh->nh", route, every)
    torch.testing.assert_close(reference.fused_moe(x, ids, weights, w, dtype=torch.float64), expected)
    torch.testing.assert_close(
        reference.fused_moe(x, ids, weights, w), expected.float(), rtol=1e-5, atol=1e-5
    )


def test_ranks_sum_to_the_whole() -> None:
    w = make_weights("bf16", dtype=torch.float32)
    x, ids, weights = make_call(9, dtype=torch.float32)
    gate_up, down = w.dequantize()
    parts = [
        reference.fused_moe(
            x, ids, weights, type(w).from_dense(gate_up[a:b], down[a:b], "bf16"), expert_offset=a
        )
        for a, b in ((0, 3), (3, 4), (4, E))
    ]
    torch.testing.assert_close(sum(parts), reference.fused_moe(x, ids, weights, w))


def test_quantised_activations_are_quantised_once_per_row() -> None:
    w = make_weights("bf16", dtype=torch.float32)
    x, ids, weights = make_call(9, dtype=torch.float32)
    q = NVFP4.quantize_rows(x)
    given = reference.fused_moe(q, ids, weights, w)
    torch.testing.assert_close(reference.fused_moe(x, ids, weights, w, input_format="nvfp4"), given)
    half = reference.fused_moe(q.dequantize(), ids, weights, w)  # the intermediate left as it is
    assert float((half - given).norm() / given.norm()) > 0.02


def test_an_empty_batch_is_empty() -> None:
    assert reference.fused_moe(*make_call(0), make_weights()).shape == (0, H)


def test_bad_arguments_are_named() -> None:
    x, ids, weights = make_call(3)
    w = make_weights()
    with pytest.raises(errors.DTypeError, match="dtype"):
        reference.fused_moe(x, ids, weights, w, dtype=torch.bfloat16)
    with pytest.raises(errors.FormatError, match="input_format 'nvfp5'; did you mean 'nvfp4'"):
        reference.fused_moe(x, ids, weights, w, input_format="nvfp5")
    with pytest.raises(errors.ShapeError, match="weights"):
        reference.fused_moe(x, ids, weights[:2], w)

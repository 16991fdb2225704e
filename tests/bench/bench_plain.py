"""The layer written out plainly, apart from everything under test."""

from __future__ import annotations

import torch

from moestro.bench.layers import Case, LayerSource, activation_of


def plain_moe(source: LayerSource, case: Case) -> torch.Tensor:
    """The layer in float32, pair by pair: [N, H]."""
    gate_up, down = (part.float() for part in source.dense)
    biases = [None if bias is None else bias.float() for bias in source.biases]
    activation = activation_of(source.shape)
    y = torch.zeros(case.num_tokens, source.shape.hidden_size)
    for n in range(case.num_tokens):
        for k in range(source.shape.top_k):
            e = int(case.ids[n, k])
            if e >= source.shape.num_local_experts:
                continue
            h = gate_up[e] @ case.x[n].float()
            h = h if biases[0] is None else h + biases[0][e]
            out = down[e] @ activation(h)
            out = out if biases[1] is None else out + biases[1][e]
            y[n] += case.weights[n, k] * out
    return y


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()

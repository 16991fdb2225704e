"""triton_kernels (python/triton_kernels of Triton's repository, 3.7 and newer) on bf16 weights.

Not run by us: the package is on no registry (what PyPI calls triton-kernels is another project), so this was
checked against the sources of 3.7.1 and 3.8.0 and is used where `triton_kernels.matmul` can be imported; up
to 3.6 it was matmul_ogs, with other arguments. Its own router takes logits; here the ids are given, so pairs
are sorted by glue.py, and SiLU and the sum over a token's experts are glue.py's as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import Adapter, installed, plain_silu
from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.formats import BF16

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["ADAPTER"]


class _Layer:
    """The dense weights, seen as [L, columns, rows]; nothing is copied."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape) -> None:
        assert isinstance(weights.gate_up, BF16)
        assert isinstance(weights.down, BF16)
        self._shape = shape
        self._gate_up = weights.gate_up.data.transpose(-1, -2)  # [L, H, 2I]
        self._down = weights.down.data.transpose(-1, -2)  # [L, I, H]
        self.nbytes = weights.nbytes

    def bind(self, case: Case) -> Call:
        from triton_kernels.matmul import PrecisionConfig, matmul
        from triton_kernels.tensor import make_ragged_tensor_metadata

        from moestro.bench.adapters import glue

        shape, x, ids = self._shape, case.x, case.ids
        pairs = ids.numel()
        align = glue.Aligner(pairs, shape.num_local_experts, (1, 1), x.device)
        ones = torch.ones(pairs, dtype=torch.int32, device=x.device)
        flat = ids.reshape(-1).long()
        activated = x.new_empty(pairs, shape.intermediate_size)
        out = torch.empty_like(x)
        precision: Any = PrecisionConfig()

        def call() -> torch.Tensor:
            align(ids)
            order = align.first.pairs[:pairs]  # with tiles of one pair, nothing is padded
            sizes = ones.new_zeros(shape.num_local_experts).scatter_add_(0, flat, ones)
            rows = make_ragged_tensor_metadata(sizes, pairs)
            hidden = matmul(
                x,
                self._gate_up,
                None,
                a_ragged_metadata=rows,
                gather_indx=order // shape.top_k,
                precision_config=precision,
            )
            glue.silu_and_mul(hidden, activated)
            y = matmul(
                activated,
                self._down,
                None,
                a_ragged_metadata=rows,
                scatter_indx=order,
                precision_config=precision,
            )
            glue.weighted_sum(
                y.view(pairs, shape.hidden_size), case.weights, ids, out, shape.num_local_experts
            )
            return out

        return call


def _missing(shape: MoeShape) -> str | None:
    reason = installed("triton_kernels", "it is in Triton's repository, on no registry") or plain_silu(shape)
    if reason is None and shape.ep > 1 and not shape.local_pairs:
        reason = "the adapter takes no pairs of other ranks"
    if reason is None:
        try:
            from triton_kernels.matmul import matmul  # noqa: F401
            from triton_kernels.tensor import make_ragged_tensor_metadata  # noqa: F401
        except Exception as error:  # other people's code may raise anything, say under an older Triton
            return f"this triton_kernels is another package, or older than Triton 3.7's: {error}"
    return reason


ADAPTER = Adapter("triton_kernels", "bf16", _missing, _Layer)

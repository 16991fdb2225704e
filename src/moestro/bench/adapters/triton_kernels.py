"""triton_kernels (python/triton_kernels of Triton's repository): `triton_kernels` and `triton_kernels_mxfp4`.

It is on no registry (what PyPI calls triton-kernels is another project). Its 3.5.1, which vLLM bundles and which runs
under Triton 3.5 and 3.6, is triton_kernels_ogs.py's, on bf16 and MXFP4. Here is what newer ones need (3.7 on, under
Triton 3.7 on): checked against the sources of 3.7.1 and 3.8.0, not run by us, bf16 only. Their router takes logits;
here the ids are given, so pairs are sorted by glue.py, and SiLU and the sum over a token's experts are glue.py's too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters import triton_kernels_ogs as ogs
from moestro.bench.adapters.base import (
    Adapter,
    PeerLayer,
    first_reason,
    installed,
    local_pairs,
    plain_silu,
)
from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.formats import BF16

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["ADAPTER", "MXFP4_WEIGHTS"]


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
    """Of bf16 weights: either generation will do."""
    if (absent := installed("triton_kernels", "it is in Triton's repository, on no registry")) is not None:
        return absent
    newer, older = _newer(shape), ogs.missing(shape)
    return None if newer is None or older is None else f"{newer}; {older}"


def _newer(shape: MoeShape) -> str | None:
    """Why `matmul` cannot run a shape here; None if it can."""
    return first_reason(lambda: plain_silu(shape), lambda: local_pairs(shape), _not_newer)


def _not_newer() -> str | None:
    try:
        from triton_kernels.matmul import matmul  # noqa: F401
        from triton_kernels.tensor import make_ragged_tensor_metadata  # noqa: F401
    except Exception as error:  # other people's code may raise anything, say under an older Triton
        return f"this triton_kernels is another package, or older than Triton 3.7's: {error}"
    return None


def _prepare(weights: ExpertWeights, shape: MoeShape) -> PeerLayer:
    return _Layer(weights, shape) if _newer(shape) is None else ogs.OgsLayer(weights, shape)


ADAPTER = Adapter("triton_kernels", "bf16", _missing, _prepare)
MXFP4_WEIGHTS = Adapter("triton_kernels_mxfp4", "mxfp4", ogs.missing, ogs.OgsLayer, package="triton_kernels")

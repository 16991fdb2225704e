"""Expert parallelism as one writes it in PyTorch: what ExpertParallel is measured beside, and nothing more.

All-gather of tokens, ids and weights; the local experts in bf16, by torch._grouped_mm on a GPU and one after
the other on a CPU; reduce-scatter. Capturable on a GPU: pairs of other experts are sorted to the end and
multiplied by nobody.
"""

from __future__ import annotations

import torch

from moestro.kernels.activations import Activation
from moestro.parallel.expert_parallel import ExpertParallel

__all__ = ["PlainGather"]


class PlainGather:
    """The plain scheme on an ExpertParallel's ranks. dense: gate_up [L, 2I, H], down [L, H, I] of its slots."""

    def __init__(
        self, ep: ExpertParallel, dense: tuple[torch.Tensor, torch.Tensor], activation: Activation
    ) -> None:
        self._ep, (self._gate_up, self._down), self._activation = ep, dense, activation

    def run(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """x [N, H] of this rank, N the same on all -> out [N, H]."""
        peers = self._ep.peers
        parcel = self._ep.ways["gather"].send(x, ids, weights, x.shape[0])
        local = parcel.ids - self._ep.layer.options.expert_offset
        y = self._experts(parcel.x, local, parcel.weights)
        return out.copy_(peers.reduce_scatter(y))

    def _experts(self, x: torch.Tensor, local: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        held, top_k = len(self._gate_up), local.shape[1]
        pairs = local.where((local >= 0) & (local < held), held).flatten()
        order = pairs.argsort(stable=True)
        counts = torch.zeros(held + 1, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, pairs.long(), torch.ones_like(pairs, dtype=torch.int32))
        rows = x[order // top_k]
        hidden = self._activation(self._products(rows, self._gate_up, counts))
        results = self._products(hidden, self._down, counts).float() * weights.flatten()[order, None]
        results = results.where((pairs[order] < held)[:, None], 0)
        return (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            .index_add_(0, order // top_k, results)
            .to(x.dtype)
        )

    @staticmethod
    def _products(rows: torch.Tensor, experts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Each expert's rows, which follow one another, times its matrix [R, C] transposed."""
        if rows.is_cuda:
            ends = counts[:-1].cumsum(0).to(torch.int32)
            return torch._grouped_mm(rows, experts.transpose(-2, -1), offs=ends)
        out = rows.new_zeros((rows.shape[0], experts.shape[1]))
        start = 0
        for expert, count in enumerate(counts[:-1].tolist()):
            out[start : start + count] = rows[start : start + count] @ experts[expert].T
            start += count
        return out

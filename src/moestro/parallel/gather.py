"""Way (a): every rank gets all tokens, computes the pairs of its own experts, and the sums are scattered back.

Ranks with fewer tokens pad to the bound with rows whose ids are -1, which no layer computes.
"""

from __future__ import annotations

import torch

from moestro.parallel.peers import Peers
from moestro.parallel.ways import Parcel, Routes, pack_pairs, pad_rows, unpack_pairs

__all__ = ["Gather"]


class Gather:
    """all-gather, local pairs, reduce-scatter."""

    name = "gather"

    def __init__(self, peers: Peers, routes: Routes) -> None:
        self._peers, self._routes = peers, routes

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bound: int) -> Parcel:
        rows = self._peers.all_gather(pad_rows(x, bound))
        pairs = pack_pairs(pad_rows(ids, bound, fill=-1), pad_rows(weights, bound))
        ids, weights = unpack_pairs(self._peers.all_gather(pairs))
        return Parcel(rows, self._mine(ids, bound), weights)

    def _mine(self, ids: torch.Tensor, bound: int) -> torch.Tensor:
        routes = self._routes
        if routes.contiguous:
            return ids  # the layer ignores what is outside its shard
        known = routes.known(ids)
        ranks = torch.cat(
            [routes.ranks(part, source) for source, part in enumerate(torch.split(known, bound))]
        )
        return routes.ids_of(known, ranks, routes.rank)

    def back(self, y: torch.Tensor, parcel: Parcel, out: torch.Tensor) -> None:
        out.copy_(self._peers.reduce_scatter(y)[: out.shape[0]])

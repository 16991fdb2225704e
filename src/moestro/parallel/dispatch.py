"""Way (b): a token goes once to each rank that holds one of its experts, and one sum comes back from each.

Two transports over all_to_all_single. `Compact` sends exactly the rows that are needed, for which the host has
to know how many: on CPUs. `Slots` gives every rank a slot for each token (row n of rank s is row s * bound + n
everywhere), so that nothing is counted and nothing can overflow: on GPUs, where the host must not wait. Over
symmetric memory (symmetric.py) the slots of tokens that a rank does not need are not written at all.

payload "fp8": rows travel as e4m3 with a float32 scale a row (half the bytes, an error of about 2.6 %).
"""

from __future__ import annotations

import torch

from moestro.parallel.peers import Peers
from moestro.parallel.ways import Parcel, Routes, pack_pairs, pad_rows, unpack_pairs

__all__ = ["Compact", "Slots", "from_fp8", "to_fp8"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes uint8 [N, H], scales float32 [N, 1]) with value = code * scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8).view(torch.uint8), scale


def from_fp8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of to_fp8."""
    return (codes.view(FP8).float() * scale).to(dtype)


class _Dispatch:
    name = "dispatch"

    def __init__(self, peers: Peers, routes: Routes, payload: str = "bf16") -> None:
        self._peers, self._routes, self._payload = peers, routes, payload

    def _wrap(self, x: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and pairs as they travel: the scale of an FP8 row is one more column of its pairs."""
        if self._payload != "fp8":
            return x, pairs
        codes, scale = to_fp8(x)
        return codes, torch.cat([pairs, scale.view(torch.int32)], dim=-1)

    def _unwrap(
        self, rows: torch.Tensor, pairs: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._payload == "fp8":
            scale = pairs[:, -1:].contiguous().view(torch.float32)
            rows, pairs = from_fp8(rows, scale, dtype), pairs[:, :-1]
        return rows, *unpack_pairs(pairs)


class Compact(_Dispatch):
    """Only the rows that are needed; the host counts them."""

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bound: int) -> Parcel:
        peers, routes = self._peers, self._routes
        known = routes.known(ids)
        ranks = routes.ranks(known, peers.rank)
        tokens = [(ranks == r).any(-1).nonzero()[:, 0] for r in range(peers.size)]
        sent = [len(part) for part in tokens]
        came = peers.exchange_numbers(torch.tensor(sent))
        index = torch.cat(tokens)
        own = [routes.ids_of(known[part], ranks[part], r) for r, part in enumerate(tokens)]
        pairs = pack_pairs(torch.cat(own), weights[index])
        rows, pairs = self._wrap(x[index], pairs)
        got = peers.all_to_all(rows, sent, came), peers.all_to_all(pairs, sent, came)
        return Parcel(*self._unwrap(*got, x.dtype), note=(index, sent, came))

    def back(self, y: torch.Tensor, parcel: Parcel, out: torch.Tensor) -> None:
        index, sent, came = parcel.note
        home = self._peers.all_to_all(y, came, sent)
        sums = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        out.copy_(sums.index_add_(0, index, home.float()))


class Slots(_Dispatch):
    """A slot for every token at every rank; the host counts nothing."""

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bound: int) -> Parcel:
        peers, routes = self._peers, self._routes
        x, ids, weights = pad_rows(x, bound), pad_rows(ids, bound, -1), pad_rows(weights, bound)
        known = routes.known(ids)
        ranks = routes.ranks(known, peers.rank)
        own = torch.stack([routes.ids_of(known, ranks, r) for r in range(peers.size)])
        copies = (peers.size, 1)
        rows, pairs = self._wrap(x.repeat(copies), pack_pairs(own.flatten(0, 1), weights.repeat(copies)))
        got = peers.all_to_all(rows), peers.all_to_all(pairs)
        return Parcel(*self._unwrap(*got, x.dtype))

    def back(self, y: torch.Tensor, parcel: Parcel, out: torch.Tensor) -> None:
        home = self._peers.all_to_all(y)  # slots that were not needed hold zeros
        out.copy_(home.view(self._peers.size, -1, out.shape[1])[:, : out.shape[0]].float().sum(0))

"""How tokens get to the experts' ranks and results back: two ways, each a `send` and a `back` around the local
experts. What is between is the same layer call for both: rows, ids and weights, of which the layer ignores
pairs that are not its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moestro.parallel.placement import Placement

__all__ = ["Parcel", "Routes", "Way", "pack_pairs", "pad_rows", "unpack_pairs"]


@dataclass(frozen=True)
class Parcel:
    """What a rank computes, and what it needs to send the result home.

    x [M, H], ids int32 [M, K] as the local layer takes them, weights float32 [M, K]. out: where the result
    must be written, if that matters.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    note: Any = None
    out: torch.Tensor | None = None


class Way(Protocol):
    """One way; all ranks take the same."""

    name: str

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bound: int) -> Parcel:
        """This rank's tokens x [N, H], ids int32 [N, K], weights [N, K] out, other ranks' in. bound >= every
        rank's N."""

    def back(self, y: torch.Tensor, parcel: Parcel, out: torch.Tensor) -> None:
        """Results y [M, H] of a parcel home, and the sums of what comes home into out [N, H]."""


class Routes:
    """Where pairs go, by the placement. Replicas take turns: token n of rank s goes to the
    ((n + s) mod copies)-th rank that holds its expert."""

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        self.placement, self.rank = placement, rank
        self.contiguous = placement.start(rank) is not None
        copies = {len(held) for held in placement.ranks}
        self.turns = 1
        for count in copies:  # a number of turns in which every expert's ranks come equally often
            self.turns = self.turns * count // _gcd(self.turns, count)
        self.turns = min(self.turns, 840)
        table = [[held[turn % len(held)] for turn in range(self.turns)] for held in placement.ranks]
        self.table = torch.tensor(
            [*table, [-1] * self.turns], dtype=torch.int32, device=device
        )  # [E + 1, turns]
        local = torch.full((placement.num_ranks, placement.num_experts + 1), -1, dtype=torch.int32)
        for r in range(placement.num_ranks):
            experts = list(placement.slots(r))
            local[r, experts] = torch.tensor(
                experts if self.contiguous else range(len(experts)), dtype=torch.int32
            )
        self.local = local.to(
            device
        )  # [R, E + 1]: the id by which a rank's layer knows an expert, -1: not there

    def known(self, ids: torch.Tensor) -> torch.Tensor:
        """ids with E for everything that is no expert: indices into the tables."""
        experts = self.placement.num_experts
        return ids.where((ids >= 0) & (ids < experts), experts)

    def ranks(self, known: torch.Tensor, first: int = 0) -> torch.Tensor:
        """int32 [N, K]: the rank of each pair, -1 for no expert. first: the turn of row 0."""
        if self.turns == 1:
            return self.table[known, 0]
        turn = (torch.arange(known.shape[0], device=known.device) + first) % self.turns
        return self.table[known, turn[:, None]]

    def ids_of(self, known: torch.Tensor, ranks: torch.Tensor, rank: int) -> torch.Tensor:
        """int32 [N, K]: the pairs of one rank, as its layer takes them; -1 for all others."""
        return self.local[rank][known].where(ranks == rank, -1)


def _gcd(a: int, b: int) -> int:
    return a if b == 0 else _gcd(b, a % b)


def pad_rows(rows: torch.Tensor, bound: int, fill: float = 0) -> torch.Tensor:
    """rows [N, ...] with rows of `fill` up to `bound`."""
    if rows.shape[0] == bound:
        return rows
    padded = rows.new_full((bound, *rows.shape[1:]), fill)
    padded[: rows.shape[0]] = rows
    return padded


def pack_pairs(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """int32 [N, 2K] of ids and the weights' bits: one collective instead of two."""
    return torch.cat([ids, weights.view(torch.int32)], dim=-1)


def unpack_pairs(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) of pack_pairs."""
    ids, weights = pairs.chunk(2, dim=-1)
    return ids.contiguous(), weights.contiguous().view(torch.float32)

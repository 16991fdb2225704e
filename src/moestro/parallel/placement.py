"""Which rank holds which experts: contiguous shards, any map, or one balanced for recorded loads.

`place` is greedy, as EPLB is: replicas go one by one to the expert with the most load a copy; then copies go,
largest first, to the least loaded rank that has room and does not hold that expert; at last swaps between the
most loaded rank and the others, as long as they help. Every rank has the same number of slots, give or take one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.errors import RoutingError

__all__ = ["Placement", "place"]

SWAPS = 200  # at most; a swap that helps by less than 1e-6 of the mean ends the search before


@dataclass(frozen=True)
class Placement:
    """placement[e], ranks[e]: the ranks that hold expert e, ascending; more than one are replicas and share its tokens.

    loads: what it was balanced for, if it was. Raises RoutingError for an expert that nobody holds, or a rank
    that is none.
    """

    ranks: tuple[tuple[int, ...], ...]
    num_ranks: int
    loads: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise RoutingError(f"placement must have at least one rank, got {self.num_ranks}")
        for expert, held in enumerate(self.ranks):
            if not held or sorted(set(held)) != list(held) or held[0] < 0 or held[-1] >= self.num_ranks:
                raise RoutingError(
                    f"placement[{expert}] must be different ranks in 0..{self.num_ranks - 1}, ascending, got {held}"
                )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Shards of consecutive experts; the first E mod R ranks have one more."""
        small, more = divmod(num_experts, num_ranks)
        counts = [small + (rank < more) for rank in range(num_ranks)]
        return cls(tuple((rank,) for rank, count in enumerate(counts) for _ in range(count)), num_ranks)

    @classmethod
    def of(cls, value: Any, num_experts: int, num_ranks: int) -> Placement:
        """From a Placement, or each expert's rank or ranks: a sequence, a tensor, or a mapping by expert.

        Raises RoutingError if it does not fit.
        """
        if isinstance(value, Placement):
            found = value
        else:
            if isinstance(value, Mapping):
                if sorted(value) != list(range(num_experts)):
                    raise RoutingError(
                        f"placement must name the experts 0..{num_experts - 1}, got {sorted(value)[:12]}"
                    )
                value = [value[expert] for expert in range(num_experts)]
            each = value.tolist() if hasattr(value, "tolist") else value
            found = cls(
                tuple((int(r),) if isinstance(r, int) else tuple(sorted(map(int, r))) for r in each),
                num_ranks,
            )
        if (len(found), found.num_ranks) != (num_experts, num_ranks):
            raise RoutingError(
                f"placement must be of {num_experts} experts on {num_ranks} ranks, got {len(found)} on "
                f"{found.num_ranks}"
            )
        return found

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.ranks)

    def __getitem__(self, expert: int) -> tuple[int, ...]:
        return self.ranks[expert]

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def replicas(self) -> int:
        """Copies beyond one of each expert."""
        return sum(map(len, self.ranks)) - len(self.ranks)

    def slots(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, in the order of its local weights: ascending."""
        return tuple(expert for expert, held in enumerate(self.ranks) if rank in held)

    def start(self, rank: int) -> int | None:
        """The first expert of a rank's shard where shards are consecutive and nobody has replicas, else None."""
        if self.replicas:
            return None
        for r in range(self.num_ranks):
            held = self.slots(r)
            if not held or held[-1] - held[0] + 1 != len(held):
                return None
        return self.slots(rank)[0]

    def rank_loads(self, loads: Sequence[float] | None = None) -> list[float]:
        """The load of each rank, replicas sharing equally. loads: of each expert; those it was made for."""
        totals = [0.0] * self.num_ranks
        for held, load in zip(self.ranks, self._loads(loads), strict=True):
            for rank in held:
                totals[rank] += load / len(held)
        return totals

    def imbalance(self, loads: Sequence[float] | None = None) -> float:
        """The most loaded rank's load over the mean: the time that waiting for it costs, 1.0 is none."""
        totals = self.rank_loads(loads)
        mean = sum(totals) / len(totals)
        return max(totals) / mean if mean else 1.0

    def _loads(self, loads: Sequence[float] | None) -> Sequence[float]:
        found = loads if loads is not None else self.loads
        if found is None:
            raise RoutingError("loads must be given for a placement that was not made for any")
        if len(found) != len(self.ranks):
            raise RoutingError(
                f"loads must have one value for each of {len(self.ranks)} experts, got {len(found)}"
            )
        return found

    def __str__(self) -> str:
        slots = [len(self.slots(rank)) for rank in range(self.num_ranks)]
        text = (
            f"{self.num_experts} experts on {self.num_ranks} ranks, {self.replicas} replicas, slots {slots}"
        )
        if self.loads is None:
            return text
        before = Placement.contiguous(self.num_experts, self.num_ranks).imbalance(self.loads)
        after = self.imbalance()
        gain = f"the most loaded rank has {after:.2f} of the mean load, {before:.2f} with contiguous shards"
        return f"{text}: {gain} ({before / after:.2f} times faster where load is all)"


def place(loads: Any, ranks: int, replicas: int = 0) -> Placement:
    """A placement of the experts on `ranks` ranks for these loads, with so many replicas of the hottest.

    loads: pairs (or any measure) of each expert, a sequence or tensor [E], or a tensor [..., E] that is
    summed: what routing.record or expert_loads() counted. `print(place(...))` says what it gains. Raises
    RoutingError for loads that are negative or not finite, fewer experts than ranks, or more replicas than
    (ranks - 1) of each expert.
    """
    loads = _as_loads(loads)
    if isinstance(ranks, bool) or not isinstance(ranks, int) or not 1 <= ranks <= len(loads):
        raise RoutingError(f"ranks must be in 1..{len(loads)}, the number of experts, got {ranks!r}")
    if not 0 <= replicas <= len(loads) * (ranks - 1):
        raise RoutingError(f"replicas must be in 0..{len(loads) * (ranks - 1)}, got {replicas!r}")
    copies = _copies(loads, ranks, replicas)
    slots = _pack(loads, copies, ranks)
    _swap(loads, copies, slots)
    held = tuple(tuple(r for r, experts in enumerate(slots) if e in experts) for e in range(len(loads)))
    return Placement(held, ranks, tuple(loads))


def _as_loads(loads: Any) -> list[float]:
    if hasattr(loads, "dim"):  # a torch tensor
        loads = loads.double().reshape(-1, loads.shape[-1]).sum(0).tolist()
    found = [float(load) for load in loads]
    if not found or not all(math.isfinite(load) and load >= 0 for load in found):
        raise RoutingError("loads must be at least one finite value >= 0 an expert")
    return found


def _copies(loads: Sequence[float], ranks: int, replicas: int) -> list[int]:
    copies = [1] * len(loads)
    for _ in range(replicas):
        open_ = [e for e in range(len(loads)) if copies[e] < ranks]
        copies[max(open_, key=lambda e: (loads[e] / copies[e], -e))] += 1
    return copies


def _pack(loads: Sequence[float], copies: Sequence[int], ranks: int) -> list[set[int]]:
    """Largest copy first to the least loaded rank with room. Replicated experts come before the others, so
    that there is always room on a rank that does not have them."""
    room = [sum(copies) // ranks + (r < sum(copies) % ranks) for r in range(ranks)]
    slots: list[set[int]] = [set() for _ in range(ranks)]
    totals = [0.0] * ranks
    order = sorted(
        range(len(loads)), key=lambda e: (copies[e] == 1, copies[e] < ranks, -loads[e] / copies[e], e)
    )
    for e in order:
        for _ in range(copies[e]):
            fitting = [r for r in range(ranks) if e not in slots[r] and len(slots[r]) < room[r]]
            # Without room anywhere else a rank gets one slot more: another expert must then do with less.
            r = min(fitting or [r for r in range(ranks) if e not in slots[r]], key=lambda r: (totals[r], r))
            slots[r].add(e)
            totals[r] += loads[e] / copies[e]
    return slots


def _swap(loads: Sequence[float], copies: Sequence[int], slots: list[set[int]]) -> None:
    """Exchange experts between the most loaded rank and another while that makes it less loaded."""
    share = [load / count for load, count in zip(loads, copies, strict=True)]
    for _ in range(SWAPS):
        totals = [sum(share[e] for e in held) for held in slots]
        top = max(range(len(slots)), key=totals.__getitem__)
        best, found = max(totals) - 1e-6 * sum(totals) / len(slots), None
        for other in range(len(slots)):
            for a in slots[top] - slots[other] if other != top else ():
                for b in slots[other] - slots[top]:
                    worst = max(totals[top] - share[a] + share[b], totals[other] + share[a] - share[b])
                    if worst < best:
                        best, found = worst, (other, a, b)
        if found is None:
            return
        other, a, b = found
        slots[top].remove(a)
        slots[other].remove(b)
        slots[top].add(b)
        slots[other].add(a)

"""ExpertParallel: an MoE layer whose experts are on several ranks, called by all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moestro.errors import BackendError, GroupError, ShapeError, unknown_name
from moestro.moe.checks import Limits, check_call, check_id_range, debugging, unchecked
from moestro.moe.layer import FusedMoE
from moestro.parallel.dispatch import Compact, Slots
from moestro.parallel.gather import Gather
from moestro.parallel.peers import Peers
from moestro.parallel.shards import local_layer
from moestro.parallel.tuned import AgreedWays, tune_ways
from moestro.parallel.ways import Routes, Way
from moestro.routing import Distribution
from moestro.tuning import Probe

__all__ = ["WAYS", "ExpertParallel"]

WAYS = ("auto", "gather", "dispatch")
PAYLOADS = ("bf16", "fp8")


class ExpertParallel(torch.nn.Module):
    """y = ep(x, ids, weights): each rank gives its own tokens and gets their results, as from the whole layer.

    layer: a FusedMoE with all experts (each rank keeps its share, in a copy: drop the layer) or with this
    rank's (expert_offset=, num_experts=; or those of placement.slots(rank)). Its max_num_tokens is the most
    that one rank passes. Everything but the experts is the same on all ranks.
    group: a torch.distributed process group (NCCL for GPUs, gloo for CPUs); every rank makes the same calls.
    placement: a Placement (place() balances one), or each expert's rank or ranks; contiguous by default.
    way: "gather" (all-gather tokens, local pairs, reduce-scatter), "dispatch" (each token once to each rank
    that needs it), or "auto": what tune() found faster for that many tokens, "gather" until then.
    payload: "fp8" sends dispatched rows as e4m3 with a scale each (results come back in x's dtype).
    timeout_s: of agreements between ranks; collectives have the group's own time-out.

    The ranks' numbers of tokens are exchanged first, for which a GPU is waited for. With bound= they are not, nor
    while a CUDA graph is captured: then all ranks have as many, and no call waits.

    Raises RoutingError or BackendError for layers that do not fit together, GroupError when a rank is lost,
    which names it.
    """

    def __init__(
        self,
        layer: FusedMoE,
        group: Any,
        placement: Any = None,
        way: str = "auto",
        *,
        payload: str = "bf16",
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        if way not in WAYS:
            raise BackendError(unknown_name("way", way, WAYS))
        if payload not in PAYLOADS:
            raise BackendError(unknown_name("payload", payload, PAYLOADS))
        self.way, self.payload = way, payload
        self.max_num_tokens, self.use_cuda_graph = layer.max_num_tokens, layer.use_cuda_graph
        self.peers = Peers(group, timeout_s)
        self.layer, self.placement = local_layer(
            layer, self.peers, placement, {"way": way, "payload": payload}
        )
        device = self.layer.weights.device
        self._limits = Limits(
            layer.weights.hidden_size, device, self.placement.num_experts, layer.top_k, layer.max_num_tokens
        )
        self.routes = Routes(self.placement, self.peers.rank, device)
        self.ways: dict[str, Way] = {"gather": Gather(self.peers, self.routes), "dispatch": self._dispatch()}
        self._agreed = AgreedWays(self)

    def _dispatch(self) -> Way:
        """The dispatch that this device can."""
        device = self._limits.device
        if device.type == "cpu":
            return Compact(self.peers, self.routes, self.payload)
        from moestro.parallel.symmetric import Symmetric

        why = Symmetric.why_not(self.peers, device, self.payload)
        if why is None:
            return Symmetric(self.peers, self.routes, self.layer, self.max_num_tokens, self.payload)
        return Slots(self.peers, self.routes, self.payload)

    @property
    def placement_text(self) -> str:
        """Who holds what."""
        return str(self.placement)

    def forward(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        *,
        bound: int | None = None,
        way: str | None = None,
    ) -> torch.Tensor:
        """x [N, H], ids int32 or int64 [N, K] (global), weights float32 [N, K] -> [N, H]; N may be 0.

        bound: a number of tokens, the same on all ranks, that none exceeds; saves the exchange of N. way:
        another than the layer's. Raises what fused_moe raises, ShapeError for more tokens than the bound.
        """
        try:
            self._check(x, ids, weights, out, bound)
        except Exception as error:
            self._give_notice(x, bound, error)
            raise
        bound = self._bound(x.shape[0], bound)
        out = torch.empty_like(x) if out is None else out
        if bound == 0:
            return out
        chosen = self.ways[way or self.way_for(bound)]
        ids = ids.clamp(-1, self.placement.num_experts).to(torch.int32)
        try:
            return self.run(chosen, x, ids, weights, out, bound)
        except GroupError:
            raise
        except Exception as error:  # the others must not wait for this rank
            self.peers.leave(error)
            raise

    def run(
        self,
        way: Way,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        bound: int,
    ) -> torch.Tensor:
        """One call by a way, its inputs checked and its ids int32."""
        parcel = way.send(x, ids, weights, bound)
        with unchecked():  # padding has ids that are none
            y = self.layer.run(parcel.x, parcel.ids, parcel.weights, parcel.out)
        way.back(y, parcel, out)
        return out

    def way_for(self, num_tokens: int) -> str:
        """The way for at most so many tokens a rank."""
        return self._agreed.find(num_tokens) if self.way == "auto" else self.way

    def tune(
        self,
        max_num_tokens: int | None = None,
        budget_s: float | None = None,
        probes: Sequence[Probe | Distribution] | None = None,
        progress: bool = True,
        *,
        strategy: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Decide tactics for the local experts and, with way="auto", the way, for up to max_num_tokens tokens
        a rank. All ranks call it; they come to the same decisions. budget_s: for the tactics; choosing ways
        takes a few seconds more. probes, strategy, timeout_s: as in FusedMoE.tune and autotune().
        """
        size = self.max_num_tokens if max_num_tokens is None else max_num_tokens
        if not 0 < size <= self.max_num_tokens:
            raise ShapeError(
                f"max_num_tokens must be in 1..{self.max_num_tokens} of this layer, got {size!r}"
            )
        how: dict[str, Any] = {"group": self.peers.group, "strategy": strategy, "timeout_s": timeout_s}
        self.layer.tune(size * self.peers.size, budget_s, probes, progress, **how)
        if self.way == "auto":
            tune_ways(self, size, timeout_s)
            self._agreed = AgreedWays(self)

    # --- checks ----------------------------------------------------------------------------------------------
    def _check(self, x: Any, ids: Any, weights: Any, out: Any, bound: int | None) -> None:
        if self.peers.link.broken:
            raise GroupError(self.peers.link.broken)
        check_call(self._limits, x, ids, weights, out)
        if debugging():
            check_id_range(ids, self._limits.num_experts)
        if bound is not None and not x.shape[0] <= bound <= self.max_num_tokens:
            raise ShapeError(
                f"bound must be at least this rank's {x.shape[0]} tokens and at most max_num_tokens="
                f"{self.max_num_tokens}, got {bound!r}"
            )

    def _bound(self, num_tokens: int, bound: int | None) -> int:
        """The most tokens that a rank has; while a CUDA graph is captured all have as many."""
        if bound is not None or self._capturing():
            return num_tokens if bound is None else bound
        numbers = self.peers.numbers(num_tokens, self._limits.device)
        if -1 in numbers:
            raise GroupError(f"rank {numbers.index(-1)} refused its call: its own error says why")
        return max(numbers)

    def _capturing(self) -> bool:
        return self._limits.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _give_notice(self, x: Any, bound: int | None, error: Exception) -> None:
        """Tell the ranks that wait for this one that it refuses its call."""
        if self.peers.link.broken:
            return
        if bound is None and not self._capturing():
            self.peers.numbers(-1, self._limits.device)
        else:
            self.peers.leave(error)

    def extra_repr(self) -> str:
        """What print(ep) shows."""
        return f"rank {self.peers.rank} of {self.peers.size}, way={self.way!r}, payload={self.payload!r}, {self.placement}"

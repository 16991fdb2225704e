"""Dispatch over symmetric memory: rows are stored straight into the other GPUs' memory, results read from it.

Every rank has the same buffers: rows [R * B, H], their pairs, and results [R * B, H]. A call is: push rows and
pairs; barrier; local experts; barrier; pull and add. Two barriers are enough: a rank pushes the next call's
rows only after this call's second barrier, when every rank has computed, and computes into its results only
after the next call's first, when every rank has pulled.

torch symmetric memory with its CUDA backend: no NVSHMEM, and no NVLink multicast, which is never asked for.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch

from moestro.moe.layer import FusedMoE
from moestro.parallel.peers import Peers
from moestro.parallel.ways import Parcel, Routes

__all__ = ["Buffers", "Symmetric", "pull", "push", "unpack"]

BLOCK = 1024


class Buffers:
    """The symmetric buffers of one layer on this rank, and the addresses of all ranks'.

    tensors: rows, ids, weights, results; addresses: int64 [R] each, on the device.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], addresses: dict[str, torch.Tensor]) -> None:
        self.tensors, self.addresses = tensors, addresses


def push(
    buffers: Buffers,
    routes: Routes,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bound: int,
    fp8: bool = False,
) -> None:
    """Write this rank's tokens to all ranks that need them; see push.push_rows."""
    from moestro.parallel.push import push_rows

    to, ranks, hidden = buffers.addresses, routes.placement.num_ranks, x.shape[1]
    block = _power_of_2(hidden) if fp8 else BLOCK
    push_rows[(bound, ranks, -(-hidden // block))](
        x, ids, weights, routes.table, routes.local, to["rows"], to["ids"], to["weights"], routes.rank,
        x.shape[0], bound, routes.placement.num_experts, routes.turns,
        H=hidden, K=ids.shape[1], K2=_power_of_2(ids.shape[1]), BLOCK=block, FP8=fp8, num_warps=8 if fp8 else 4,
    )  # fmt: skip


def unpack(
    codes: torch.Tensor, ids: torch.Tensor, scaled: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [M, H], weights [M, K]) of e4m3 codes [M, H] and weights with a scale [M, K + 1]; see unpack_rows."""
    from moestro.parallel.push import unpack_rows

    rows, weights = codes.new_empty(codes.shape, dtype=dtype), scaled.new_empty(ids.shape)
    (count, hidden), top_k = codes.shape, ids.shape[1]
    unpack_rows[(count, -(-hidden // BLOCK))](
        codes, ids, scaled, rows, weights, H=hidden, K=top_k, K2=_power_of_2(top_k), BLOCK=BLOCK, num_warps=4
    )
    return rows, weights


def pull(buffers: Buffers, routes: Routes, ids: torch.Tensor, out: torch.Tensor, bound: int) -> None:
    """Add up what the ranks computed for this rank's tokens; see push.pull_sums."""
    from moestro.parallel.push import pull_sums

    tokens, hidden = out.shape
    if not tokens:
        return
    pull_sums[(tokens, -(-hidden // BLOCK))](
        out, ids, routes.table, routes.local, buffers.addresses["results"], routes.rank, bound,
        routes.placement.num_experts, routes.turns, R=routes.placement.num_ranks,
        H=hidden, K=ids.shape[1], K2=_power_of_2(ids.shape[1]), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


class Symmetric:
    """The dispatch way on GPUs that see each other's memory."""

    name = "dispatch"

    def __init__(
        self, peers: Peers, routes: Routes, layer: FusedMoE, max_num_tokens: int, payload: str
    ) -> None:
        self._peers, self._routes, self._fp8 = peers, routes, payload == "fp8"
        self._timeout_ms = int(peers.link.timeout_s * 1000)
        self._buffers, self._handle = _allocate(peers, routes, layer, max_num_tokens, payload)

    @classmethod
    def why_not(cls, peers: Peers, device: torch.device, payload: str) -> str | None:
        """Why the ranks do not use it; the same on all of them."""
        said = peers.link.exchange("symmetric memory", [_why_not_here(device, peers.size), _host()])
        if len({host for _, host in said}) > 1:
            return f"the ranks are on {len({host for _, host in said})} hosts"
        return next((f"rank {rank}: {why}" for rank, (why, _) in enumerate(said) if why), None)

    def send(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, bound: int) -> Parcel:
        count, (hidden, top_k) = self._peers.size * bound, (x.shape[1], ids.shape[1])
        push(self._buffers, self._routes, x, ids, weights, bound, self._fp8)
        self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)
        rows, pairs = self._part("rows", count, hidden), self._part("ids", count, top_k)
        scaled = self._part("weights", count, top_k + self._fp8)
        if self._fp8:
            rows, scaled = unpack(rows, pairs, scaled, x.dtype)
        return Parcel(rows, pairs, scaled, note=(ids, bound), out=self._part("results", count, hidden))

    def _part(self, name: str, count: int, width: int) -> torch.Tensor:
        return self._buffers.tensors[name][: count * width].view(count, width)

    def back(self, y: torch.Tensor, parcel: Parcel, out: torch.Tensor) -> None:
        ids, bound = parcel.note
        self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)
        pull(self._buffers, self._routes, ids, out, bound)


def _host() -> str:
    """What tells this host from others, also inside containers: its kernel's boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _why_not_here(device: torch.device, ranks: int) -> str:
    if device.type != "cuda":
        return f"symmetric memory is for CUDA devices, this is {device}"
    switch = os.environ.get("MOESTRO_SYMMETRIC_MEMORY", "1")
    if switch == "0":
        return "MOESTRO_SYMMETRIC_MEMORY=0"
    # a reason, which all ranks hear: an error of one would leave the others waiting
    if switch not in ("", "1"):
        return f"MOESTRO_SYMMETRIC_MEMORY must be 0 or 1, got {switch!r}"
    try:
        import torch.distributed._symmetric_memory
        import triton  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    count = torch.cuda.device_count()
    if count < ranks:
        return f"only {count} of {ranks} GPUs are visible (CUDA_VISIBLE_DEVICES)"
    alone = [
        p for p in range(count) if p != device.index and not torch.cuda.can_device_access_peer(device, p)
    ]
    return f"{device} cannot reach the memory of device {alone[0]}" if alone else ""


def _allocate(
    peers: Peers, routes: Routes, layer: FusedMoE, max_num_tokens: int, payload: str
) -> tuple[Buffers, Any]:
    """The buffers of all ranks for the largest call, and the handle whose barrier joins them."""
    import torch.distributed._symmetric_memory as symmetric

    hidden, more = layer.weights.hidden_size, payload == "fp8"
    count, device = peers.size * max_num_tokens, layer.weights.device
    wanted = {
        "rows": (count * hidden, torch.float8_e4m3fn if more else layer.dtype),
        "ids": (count * layer.top_k, torch.int32),
        "weights": (count * (layer.top_k + more), torch.float32),
        "results": (count * hidden, layer.dtype),
    }
    tensors, addresses, handle = {}, {}, None
    for name, (size, dtype) in wanted.items():
        tensors[name] = symmetric.empty(size, dtype=dtype, device=device)
        handle = symmetric.rendezvous(tensors[name], peers.group)
        theirs = [handle.get_buffer(rank, (size,), dtype).data_ptr() for rank in range(peers.size)]
        addresses[name] = torch.tensor(theirs, dtype=torch.int64, device=device)
    return Buffers(tensors, addresses), handle


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()

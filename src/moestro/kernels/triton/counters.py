"""The counters of a layer's chains: zero between calls, so not in a workspace that is shared; one set for each stream.

A chain's tiles count themselves while it runs, and the kernel that sums the pairs clears the counters: calls of one
stream follow each other and may share a set, calls of two may not. A stream that is being captured for the first time
takes a set that was cleared before, since what a capture allocates is no memory of ours; graphs that were captured on
one stream share its set, and must be replayed one after another.
"""

from __future__ import annotations

import threading

import torch

from moestro.kernels.triton.device.chain import LINE
from moestro.kernels.triton.paths.chain import SLOTS


class Counters:
    """Zeroed int32 [SLOTS * LINE] for each stream that asks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_stream: dict[int, torch.Tensor] = {}
        self._spare: torch.Tensor | None = self._new()
        self._lock = threading.Lock()

    def _new(self) -> torch.Tensor:
        return torch.zeros(SLOTS * LINE, dtype=torch.int32, device=self._device)

    def here(self) -> torch.Tensor:
        """Those of the current stream."""
        cuda = self._device.type == "cuda"
        return self.of(int(torch.cuda.current_stream(self._device).cuda_stream) if cuda else 0)

    def of(self, stream: int) -> torch.Tensor:
        """Those of a stream, the current one."""
        found = self._of_stream.get(stream)
        if found is not None:
            return found
        with self._lock:
            capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if capturing and self._spare is None:
                return self._new()  # cleared by the graph itself, each time
            self._of_stream[stream] = self._spare if self._spare is not None else self._new()
            self._spare = None if capturing else self._new()
            return self._of_stream[stream]

    def clear(self) -> None:
        """After a call that broke off: the launch that clears them may not have run."""
        for counters in list(self._of_stream.values()):
            counters.zero_()

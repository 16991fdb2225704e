"""Scratch memory that a layer owns, or that the layers of one model share.

It grows to what is asked for and never shrinks. A buffer that was outgrown is kept: a CUDA graph that was
captured with it still replays. Not for concurrent calls: give each thread or stream its own.
"""

from __future__ import annotations

import torch

from moestro.errors import BackendError


class Workspace:
    """One byte buffer on a device, as large as the largest request so far."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._outgrown: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes in use now, without outgrown buffers."""
        return self._buffer.numel()

    def at_least(self, nbytes: int) -> torch.Tensor:
        """The buffer, of at least `nbytes` bytes.

        Raises BackendError where that would need an allocation inside a CUDA graph capture.
        """
        if self._buffer.numel() < nbytes:
            self._grow(nbytes)
        return self._buffer

    def _grow(self, nbytes: int) -> None:
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"workspace must have {nbytes} bytes before a CUDA graph capture, got {self.nbytes}; "
                    "make the layer with use_cuda_graph=True, or call it once with as many tokens"
                )
            if self.nbytes:
                self._outgrown.append(self._buffer)
        with torch.inference_mode(False):  # a tensor that may be written in any mode
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

"""Scratch memory for the calls on a device: a buffer for each call in flight, used again by the next one.

A call takes a buffer and gives it back when its work is enqueued. On a GPU there is a list of free buffers for each
stream: what is given back there is only taken by work that comes after on the same stream. Captured CUDA graphs share
one buffer of their own, which is there before the capture, and is kept when a larger one takes its place, since graphs
that hold its address still replay. Taking and giving are one operation on a list each, which Python does not
interrupt: no lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from moestro.errors import BackendError
from moestro.tuning.forks import Lock


class Workspace:
    """The buffers of one device. Layers that share one need what their calls in flight need, not each its own."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._free: list[torch.Tensor] = []  # of a CPU
        self._of_stream: dict[int, list[torch.Tensor]] = {}
        self._stream = _stream_of(self.device)
        self._for_graphs: torch.Tensor | None = None
        self._outgrown: list[torch.Tensor] = []
        self._trials: weakref.ref[torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for later calls and for graphs, without those of calls in flight and outgrown ones."""
        held = [*self._free, *(b for free in list(self._of_stream.values()) for b in free)]
        if self._for_graphs is not None:
            held.append(self._for_graphs)
        return sum(buffer.numel() for buffer in held)

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least `nbytes` bytes, that nobody else has until it is given back.

        Raises BackendError where that would need an allocation inside a CUDA graph capture.
        """
        free = self._free if self._stream is None else self._of_stream.setdefault(self._stream(), [])
        try:
            buffer = free.pop()
        except IndexError:
            return self._new(nbytes)
        return buffer if buffer.numel() >= nbytes else self._new(nbytes)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back, on the stream that it was taken on."""
        if self._stream is None:
            self._free.append(buffer)
        elif buffer is not self._for_graphs:
            self._of_stream.setdefault(self._stream(), []).append(buffer)

    def reserve(self, nbytes: int) -> None:
        """Have a buffer of so many bytes: for CUDA graphs, or on a CPU for the next call."""
        if self._stream is None:
            self.give(self.take(nbytes))
        elif self._for_graphs is None or self._for_graphs.numel() < nbytes:
            if self._for_graphs is not None:
                self._outgrown.append(self._for_graphs)
            self._for_graphs = self._empty(nbytes)

    def for_trials(self, nbytes: int) -> torch.Tensor:
        """A buffer for measurements, of which there is one at a time; it lives as long as a runner holds it."""
        held = self._trials() if self._trials is not None else None
        if held is None or held.numel() < nbytes:
            held = self._empty(nbytes)
            self._trials = weakref.ref(held)
        return held

    def _new(self, nbytes: int) -> torch.Tensor:
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            return self._empty(nbytes)
        held = self._for_graphs
        if held is None or held.numel() < nbytes:
            raise BackendError(
                f"workspace must have {nbytes} bytes before a CUDA graph capture, got "
                f"{0 if held is None else held.numel()}; make the layer with use_cuda_graph=True"
            )
        return held

    def _empty(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a tensor that may be written in any mode
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


def _stream_of(device: torch.device) -> Callable[[], int] | None:
    """What says the current stream of a GPU; None for a device without streams."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 0.2 µs; the public way makes an object, 2 µs
    if raw is None:
        return lambda: int(torch.cuda.current_stream(index).cuda_stream)
    return lambda: int(raw(index))


_shared: weakref.WeakValueDictionary[str, Workspace] = weakref.WeakValueDictionary()
_sharing = Lock()


def shared(device: torch.device) -> Workspace:
    """The workspace that all layers and functions on a device use unless given another; it goes with the last."""
    with _sharing:
        held = _shared.get(str(device))
        if held is None:
            held = _shared[str(device)] = Workspace(device)
        return held

"""GPU time of a call, as served: from a CUDA graph, or eagerly, with a cold L2.

One sample: (1) a sleep kernel, so that the host is ahead of the GPU while it queues what follows; (2) 256
MiB are written, which leaves no weights or inputs in L2; (3) event, call or graph replay, event. With (1)
and (2) queued ahead, launch time shows in the window only where the GPU has to wait for launches *within*
the call. A graph has none; an eager call is served with its launches in the way unless the host runs ahead,
so there the host waits for (2) to finish before (3), unless `hide_launches` says that serving runs ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.measure.nvml import reading
from moestro.tuning.measure.scope import measurement
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["CudaTimer"]

FLUSH_BYTES = 256 << 20
BACKLOG_CYCLES = 60_000  # 30-40 µs at 1.5-2 GHz: more than the host needs for two events and a graph launch


class _Replay:
    """Replays a captured call, and keeps it alive with the tensors that the graph refers to."""

    def __init__(self, graph: Any, call: Callable[[], Any]) -> None:
        self._replay, self._owner = graph.replay, call

    def __call__(self) -> Any:
        return self._replay()


class CudaTimer:
    """Seconds between two CUDA events around a call."""

    def __init__(
        self,
        policy: MeasurementPolicy | None = None,
        *,
        device: str = "cuda",
        graph: bool = True,
        hide_launches: bool | None = None,
        flush_bytes: int = FLUSH_BYTES,
    ) -> None:
        """hide_launches: queue the call behind a backlog; as `graph` if None."""
        import torch

        self._torch = torch
        self.policy = policy or MeasurementPolicy()
        self.device = torch.device(device)
        self.graph = graph
        self.hide_launches = graph if hide_launches is None else hide_launches
        heat = "cold" if self.policy.cold_cache else "warm"
        self.name = (
            f"cuda-{'graph' if graph else 'eager' if not self.hide_launches else 'eager-hidden'}-{heat}"
        )
        self._flush_bytes = flush_bytes
        self._buffer: Any = None
        self._pool: Any = None

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        """The sampler keeps the call: a graph reads and writes memory that only the call may own.

        Raises what the call raises, and TuningError if it cannot be captured.
        """
        torch = self._torch
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream), measurement():
                for _ in range(max(1, self.policy.warmup)):
                    call()
            stream.synchronize()
            served = self._capture(call, stream) if self.graph else call
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream):
                self._cold()  # allocates the buffer
            stream.synchronize()

        def sample() -> float:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                if self.hide_launches:
                    torch.cuda._sleep(BACKLOG_CYCLES)
                self._cold()
                if not self.hide_launches:
                    stream.synchronize()
                with measurement():
                    start.record(stream)
                    served()
                    end.record(stream)
                    end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3

        return sample

    sustains = True  # its clock falls under load: measure/decide.py

    def conditions(self) -> dict[str, Any] | None:
        """The SM clock in MHz and why it is held back, now; None where NVML cannot tell."""
        return reading(str(self._torch.cuda.get_device_properties(self.device).uuid))

    def _capture(self, call: Callable[[], Any], stream: Any) -> Callable[[], Any]:
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        # Candidates never replay at the same time, so their graphs share one memory pool.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            capture = torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            )
            with capture, measurement():
                call()
        except Exception as error:
            torch.cuda.synchronize(self.device)
            self._pool = torch.cuda.graph_pool_handle()  # a capture that broke off leaves its pool recording
            raise TuningError(
                f"cannot be captured in a CUDA graph: {type(error).__name__}: {error}"
            ) from error
        with measurement():
            graph.replay()
        stream.synchronize()
        return _Replay(graph, call)

    def _cold(self) -> None:
        if not self.policy.cold_cache:
            return
        if self._buffer is None:
            self._buffer = self._torch.empty(self._flush_bytes, dtype=self._torch.uint8, device=self.device)
        self._buffer.zero_()

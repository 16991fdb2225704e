"""What the CUDA timer queues, in which order, on a torch that only writes it down (tests/gpu uses one)."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from moestro.errors import TuningError
from moestro.tuning import MeasurementPolicy, is_in_profile_measurement
from moestro.tuning.measure.timers import default_timer


class FakeTorch(types.ModuleType):
    """Enough of torch for the timer; `log` is what the GPU and the host would see."""

    uint8 = "uint8"

    def __init__(self) -> None:
        super().__init__("torch")
        self.log: list[str] = []
        self.capture_fails = False
        log, outer = self.log, self

        class Stream:
            def __init__(self, device: Any) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                pass

            def synchronize(self) -> None:
                log.append("wait")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                log.append("event")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return 1.5

        class Graph:
            def replay(self) -> None:
                assert is_in_profile_measurement()
                log.append("replay")

        @contextlib.contextmanager
        def graph(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            log.append(f"capture into {pool}")
            yield
            if outer.capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing")

        self.cuda = types.SimpleNamespace(
            device=lambda device: contextlib.nullcontext(),
            stream=lambda stream: contextlib.nullcontext(),
            Stream=Stream,
            Event=Event,
            CUDAGraph=Graph,
            graph=graph,
            graph_pool_handle=lambda: "pool",
            current_stream=lambda device: None,
            synchronize=lambda device: log.append("wait"),
            _sleep=lambda cycles: log.append("sleep"),
        )

    def device(self, name: str) -> str:
        return name

    def empty(self, size: int, dtype: str, device: str) -> Any:
        assert size == 256 << 20
        return types.SimpleNamespace(zero_=lambda: self.log.append("flush"))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


def call(torch: FakeTorch) -> Any:
    def run() -> None:
        assert is_in_profile_measurement()
        torch.log.append("call")

    return run


def test_a_graph_is_captured_once_and_replayed_cold_behind_a_backlog(torch: FakeTorch) -> None:
    timer = default_timer("cuda:0", MeasurementPolicy(warmup=2), graph=True)
    sampler = timer.prepare(call(torch))
    assert torch.log[:6] == ["call", "call", "wait", "capture into pool", "call", "replay"]
    torch.log.clear()
    assert sampler() == pytest.approx(1.5e-3)
    assert torch.log == ["sleep", "flush", "event", "replay", "event"]
    assert timer.name == "cuda-graph-cold"


def test_an_eager_call_is_launched_when_the_gpu_is_idle(torch: FakeTorch) -> None:
    timer = default_timer("cuda", MeasurementPolicy(), graph=False)
    sampler = timer.prepare(call(torch))
    torch.log.clear()
    sampler()
    assert torch.log == ["flush", "wait", "event", "call", "event"]
    assert timer.name == "cuda-eager-cold"


def test_a_warm_cache_is_not_flushed(torch: FakeTorch) -> None:
    timer = default_timer("cuda", MeasurementPolicy(cold_cache=False), graph=True)
    sampler = timer.prepare(call(torch))
    sampler()
    assert "flush" not in torch.log
    assert timer.name == "cuda-graph-warm"


def test_what_cannot_be_captured_is_an_error_that_says_so(torch: FakeTorch) -> None:
    torch.capture_fails = True
    timer = default_timer("cuda", MeasurementPolicy(), graph=True)
    with pytest.raises(TuningError, match=r"cannot be captured in a CUDA graph: RuntimeError: operation not"):
        timer.prepare(call(torch))
    assert not is_in_profile_measurement()
    torch.capture_fails = False
    assert timer.prepare(call(torch))() > 0


def test_a_sampler_keeps_the_call_whose_memory_its_graph_uses(torch: FakeTorch) -> None:
    def measured() -> None:
        pass

    watched = weakref.ref(measured)
    sampler = default_timer("cuda:0", MeasurementPolicy(), graph=True).prepare(measured)
    del measured
    gc.collect()
    assert watched() is not None
    sampler()

"""Counters of chains: one set a stream, cleared before it is used, and nothing of a capture's memory is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moestro.kernels.triton.counters import Counters


class Streams(Counters):
    """Counters that believe to be on a GPU."""

    def _new(self) -> torch.Tensor:
        return torch.zeros(8, dtype=torch.int32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(stream=0, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_a_stream_keeps_its_counters_and_shares_them_with_no_other(gpu: SimpleNamespace) -> None:
    counters = Streams(torch.device("cuda"))
    first = counters.here()
    gpu.stream = 1
    second = counters.here()
    assert second is counters.here() is not first
    gpu.stream = 0
    assert counters.here() is first


def test_a_first_capture_takes_counters_that_were_cleared_before(gpu: SimpleNamespace) -> None:
    counters = Streams(torch.device("cuda"))
    counters.here()
    spare = counters._spare
    gpu.stream, gpu.capturing = 7, True
    assert counters.here() is spare is counters.here()
    gpu.stream = 8  # a second capture before anything has run outside one: cleared by the graph, and not kept
    assert counters.here() is not counters.here()
    gpu.capturing = False
    assert counters.here() is counters.here()


def test_a_call_that_broke_off_leaves_all_of_them_cleared(gpu: SimpleNamespace) -> None:
    counters = Streams(torch.device("cuda"))
    counters.here().fill_(3)
    counters.clear()
    assert not counters.here().any()

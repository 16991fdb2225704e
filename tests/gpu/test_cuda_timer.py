"""The CUDA timer on a GPU: graphs, eager calls, what cannot be captured.

Nothing is asserted on how long things take but that 4096 times the work takes longer.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from moestro.errors import TuningError
from moestro.tuning import MeasurementPolicy, is_in_profile_measurement
from moestro.tuning.measure.timers import default_timer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("cold", [True, False])
def test_more_work_takes_longer_in_every_mode(graph: bool, cold: bool) -> None:
    timer = default_timer("cuda", MeasurementPolicy(cold_cache=cold), graph=graph)
    small, large = (torch.ones(n, n, device="cuda") for n in (64, 4096))
    seconds = []
    for matrix in (small, large):
        out = torch.empty_like(matrix)
        sampler = timer.prepare(lambda m=matrix, o=out: torch.mm(m, m, out=o))  # type: ignore[misc]
        seconds.append(statistics.median(sampler() for _ in range(9)))
        assert out[0, 0].item() == len(matrix)
    assert 0 < seconds[0] < seconds[1] < 1


def test_a_call_that_waits_for_the_gpu_cannot_be_captured_and_the_next_one_can() -> None:
    timer = default_timer("cuda", MeasurementPolicy(), graph=True)
    x = torch.ones(8, device="cuda")
    with pytest.raises(TuningError, match="cannot be captured"):
        timer.prepare(lambda: x.sum().item())
    y = torch.zeros(8, device="cuda")
    sampler = timer.prepare(lambda: y.add_(x))
    before = y[0].item()
    assert sampler() > 0
    assert y[0].item() == before + 1


def test_the_scope_is_on_while_capturing_and_off_after() -> None:
    seen = []
    timer = default_timer("cuda", MeasurementPolicy(), graph=True)
    x = torch.ones(8, device="cuda")

    def call() -> None:
        seen.append(is_in_profile_measurement())
        x.mul_(1)

    sampler = timer.prepare(call)
    runs = len(seen)
    sampler()
    assert set(seen) == {True}
    assert len(seen) == runs  # a replay runs no Python
    assert not is_in_profile_measurement()

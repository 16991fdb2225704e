"""Calls at addresses that came before are one launch of a graph: when, how many, and what a driver's refusal does."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6")

from fake_cuda import Function

from moestro.kernels.triton import graphs


class Library:
    """Stands for libcuda."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses: dict[str, int] = {}
        self.graphs, self.mode = 0, 0
        for name in graphs.FUNCTIONS:
            setattr(self, name, Function(self, name))

    def called(self, name: str, arguments: tuple[Any, ...]) -> int:
        """The status that function `name` returns."""
        self.calls.append(name)
        if name == "cuGraphInstantiateWithFlags":
            self.graphs += 1
            arguments[0]._obj.value = self.graphs
        if name == "cuStreamEndCapture" and not self.refuses.get(name):
            arguments[1]._obj.value = 5
        if name == "cuStreamCreate":
            arguments[0]._obj.value = 99
        if name == "cuThreadExchangeStreamCaptureMode":
            mode = arguments[0]._obj
            mode.value, self.mode = self.mode, mode.value
        return self.refuses.get(name, 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setattr(graphs.Graphs, "broken", False)
    monkeypatch.setattr(graphs.Graphs, "alive", 0)
    return Library()


def made(library: Library) -> tuple[graphs.Graphs, list[tuple[int, ...]]]:
    launched: list[tuple[int, ...]] = []
    return graphs.Graphs(graphs.Driver(library), 0, lambda *at: launched.append(at)), launched


def test_the_third_call_at_the_same_addresses_is_captured_and_later_ones_launch_that(
    library: Library,
) -> None:
    plan, launched = made(library)
    answers = [plan.launch(7, 16, 32) for _ in range(6)]
    assert answers == [False, False, True, True, True, True]
    assert launched == [(99, 16, 32)]  # once, while capturing, on the stream for that
    assert library.calls.count("cuGraphLaunch") == 4
    assert library.calls.count("cuGraphInstantiateWithFlags") == library.calls.count("cuGraphDestroy") == 1
    assert library.mode == 0  # given back


def test_other_addresses_and_streams_have_their_own_graphs(library: Library) -> None:
    plan, launched = made(library)
    for _ in range(3):
        for stream, at in ((7, 16), (7, 32), (8, 16)):
            plan.launch(stream, at)
    assert launched == [(99, 16), (99, 32), (99, 16)]
    assert plan.launch(7, 48) is False


def test_no_more_graphs_than_are_kept_and_none_stays_when_the_plan_goes(library: Library) -> None:
    plan, _ = made(library)
    for at in range(graphs.KEPT + 3):
        for _ in range(graphs.AFTER):
            plan.launch(7, at)
    assert plan.launch(7, 0) is True
    assert plan.launch(7, graphs.KEPT + 1) is False
    assert graphs.Graphs.alive == graphs.KEPT
    del plan
    gc.collect()
    assert library.calls.count("cuGraphExecDestroy") == graphs.KEPT
    assert graphs.Graphs.alive == 0


@pytest.mark.parametrize("name", ["cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags", "cuGraphLaunch"])
def test_a_refusal_ends_it_for_the_process_with_one_line(
    library: Library, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuses[name] = 801
    plan, _ = made(library)
    with caplog.at_level(logging.WARNING, logger="moestro"):
        answers = [plan.launch(7, 16) for _ in range(3)]
    assert answers == [False] * 3
    assert graphs.Graphs.broken
    assert library.mode == 0
    [record] = caplog.records
    assert f"{name} must return 0, got 801" in record.getMessage()


@pytest.mark.parametrize("status", [0, 901])
def test_a_launch_that_cannot_be_captured_ends_the_capture_and_is_left_to_an_ordinary_launch(
    library: Library, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    def launches(*_: int) -> None:
        raise RuntimeError("not while capturing")

    library.refuses["cuStreamEndCapture"] = status  # as after an error inside
    plan = graphs.Graphs(graphs.Driver(library), 0, launches)
    with caplog.at_level(logging.WARNING, logger="moestro"):
        assert [plan.launch(7, 16) for _ in range(3)] == [False] * 3
    assert graphs.Graphs.broken
    [record] = caplog.records
    assert ("cuStreamEndCapture must return 0" if status else "not while capturing") in record.getMessage()
    assert library.calls.count("cuGraphDestroy") == (status == 0)
    assert library.mode == 0


def test_threads_capture_one_graph_each_time(library: Library) -> None:
    plan, launched = made(library)
    threads = [threading.Thread(target=lambda: [plan.launch(7, 16) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) - library.calls.count("cuGraphExecDestroy") == 1


def test_a_library_without_graphs_is_an_error_that_names_the_function() -> None:
    class Bare:
        cuStreamCreate = Function(Library(), "cuStreamCreate")  # noqa: N815

    with pytest.raises(AttributeError, match="cuThreadExchangeStreamCaptureMode"):
        graphs.Driver(Bare())

"""Backends by name: loaded when asked for, absent with a reason, preferred in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from moestro.errors import BackendError
from moestro.kernels import backends
from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.problem import MoeProblem

PROBLEM = MoeProblem(8, 8, 0, 2, 64, 64, "nvfp4")


class Picky(PortableRunner):
    """Takes one layout of its own, and silu only."""

    backend: ClassVar[str] = "picky"

    @classmethod
    def runs_layout(cls, layout: str) -> bool:
        return super(PortableRunner, cls).runs_layout(layout)

    @classmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        return "no such device" if problem.device != "cpu" else None


def broken() -> Any:
    raise ImportError("no module named 'fast'")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        backends,
        "BACKENDS",
        {"broken": broken, "picky": lambda: Picky, "portable": lambda: PortableRunner},
    )
    backends._load.cache_clear()
    backends._say.cache_clear()
    yield
    backends._load.cache_clear()


def changed(**fields: Any) -> MoeProblem:
    return MoeProblem(**{**vars(PROBLEM), **fields})


def test_auto_is_all_that_can_in_the_order_of_preference() -> None:
    assert backends.resolve("auto", PROBLEM) == [Picky, PortableRunner]
    assert backends.resolve("auto", changed(device="cuda")) == [PortableRunner]


def test_what_is_left_to_the_portable_backend_is_logged_once_with_the_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "OWN", {"cuda": "picky", "cpu": "picky"})
    for device in ("cpu", "cuda", "cuda"):
        backends.resolve("auto", changed(device=device))
    backends.resolve("portable", changed(device="cuda"))
    (said,) = caplog.messages
    assert "nvfp4 weights, x in bfloat16 on cuda" in said
    assert said.endswith("backend 'picky' cannot: no such device")


def test_a_named_backend_is_alone() -> None:
    assert backends.resolve("portable", PROBLEM) == [PortableRunner]


def test_a_backend_that_cannot_be_imported_says_why() -> None:
    assert backends.why_not("broken", PROBLEM) == "it cannot be imported: ImportError: no module named 'fast'"
    with pytest.raises(BackendError, match="backend 'broken' cannot run this: it cannot be imported"):
        backends.resolve("broken", PROBLEM)


def test_a_backend_that_cannot_run_the_problem_says_why() -> None:
    with pytest.raises(BackendError, match="backend 'picky' cannot run this: no such device"):
        backends.resolve("picky", changed(device="cuda"))


def test_layouts_are_for_the_backend_that_made_them() -> None:
    assert backends.why_not("picky", changed(weight_layout="picky_rows")) is None
    assert "layout 'other_rows'" in (backends.why_not("picky", changed(weight_layout="other_rows")) or "")
    assert backends.why_not("portable", changed(weight_layout="other_rows")) is None


def test_an_unknown_backend_is_an_error_with_the_nearest_names() -> None:
    for ask in (backends.resolve, backends.why_not):
        with pytest.raises(BackendError, match="unknown backend 'pickly'; did you mean 'picky'"):
            ask("pickly", PROBLEM)


def test_a_runner_checks_tactics_against_what_it_lists() -> None:
    class Listed(Picky):
        check_tactic = PortableRunner.__mro__[1].check_tactic  # MoeRunner's own

    runner = Listed.__new__(Listed)
    runner.get_valid_tactics = lambda inputs, profile: [("a", 1)]  # type: ignore[method-assign]
    runner.check_tactic([torch.empty(3, 4)], ("a", 1))
    runner.check_tactic([torch.empty(3, 4)], -1)
    with pytest.raises(BackendError, match=r"tactic \('b', 1\) is not one of backend 'picky' for 3 tokens"):
        runner.check_tactic([torch.empty(3, 4)], ("b", 1))

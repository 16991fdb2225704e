"""Explanations: what was chosen and why."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuning_fakes import WRONG, Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningWarning
from moestro.tuning import Probe
from moestro.tuning.show.explain import Case, explain
from moestro.tuning.spec.evidence import CandidateEvidence, Evidence, Record

TIMES: dict[Any, Any] = {
    -1: 3e-4,
    ("swap", 64): lambda n: 1e-4 if n <= 2900 else 3e-4,
    ("swap", 128): 2e-4,
    3: WRONG,
    4: ValueError("no such [tile]"),
}


def tuned(store: Path | None = None, size: int = 4096, cfg: Any = None, **times: Any) -> Any:
    clock = quiet_clock()
    runner, cfg = Kernel(clock, TIMES, stages=3), cfg or config()
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("moe", [runner], cfg, inputs(size))
    return lambda n, **more: t.explain("moe", [runner], cfg, inputs(n, **more))


def test_it_says_what_was_chosen_why_and_against_whom(store: Path) -> None:
    text = tuned(store)(64)
    assert text.startswith("moe at size 64: Kernel, tactic ('swap', 64)  [measured]")
    assert "decided at bucket 64" in text
    assert "0.333 of the default's time [0.3" in text
    assert "noise floor" in text
    for candidate in ("('swap', 64)", "('swap', 128)", "default (-1)"):
        assert candidate in text
    assert "quarantined" in text
    assert "no such [tile]" in text
    assert "just now" in text
    assert str(store) in text
    assert "confidence=0.95" in text
    assert "clock: simulated" in text
    assert "torch 2" in text


def test_it_says_where_the_winner_changes() -> None:
    explain = tuned()
    assert "a size above: between 2" in explain(2600)
    assert "the winner becomes Kernel, tactic ('swap', 128)" in explain(2600)
    assert "a size below: between 2" in explain(3300)
    assert "a point between buckets" in explain(2800)


def test_it_says_when_a_size_is_beyond_what_was_tuned() -> None:
    text = tuned()(9000)
    assert "[extrapolated]" in text
    assert "tuning at 9000" in text


def test_it_says_what_sets_an_unknown_call_apart() -> None:
    text = tuned()(64, width=32)
    assert "nothing is known" in text
    assert "inputs[0].shape[1]: 64, here 32" in text


def test_an_op_that_nothing_is_known_of() -> None:
    clock = quiet_clock()
    text = tuner(clock).explain("new", [Kernel(clock, TIMES)], config(), inputs(8))
    assert "nothing is known; the default serves" in text


def test_each_probes_ratio_is_a_column() -> None:
    probes = tuple(Probe(name, lambda inputs, profile, seed: inputs) for name in ("uniform", "zipf(1.0)"))
    text = tuned(cfg=config((64,), probes=probes), size=64)(64)
    assert "uniform" in text
    assert "zipf(1.0)" in text
    assert "inputs: uniform, zipf(1.0)" in text


def test_a_kept_default_says_by_how_much_the_best_other_missed() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 0.99e-3}), config((64,)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    text = t.explain("op", [runner], cfg, inputs(64))
    assert "nothing was proven faster by more than the margin" in text
    assert re.search(r"the best other one had (0\.9[89]|1\.00)", text)


def test_a_decision_without_a_race_says_so() -> None:
    clock = quiet_clock()
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: WRONG}), config((64,)), tuner(clock)
    with t.autotune(True):
        t.choose_one("op", [runner], cfg, inputs(64))
    text = t.explain("op", [runner], cfg, inputs(64))
    assert "[quarantined]" in text
    assert "the only one left" in text
    assert "lifting the quarantine of 1 (0)" in text


def test_an_unfinished_race_says_so() -> None:
    clock = quiet_clock(noise=0.05)
    runner, cfg, t = Kernel(clock, {-1: 1e-3, 0: 0.98e-3}), config((64,)), tuner(clock, verify=False)
    with t.autotune(True, budget_s=0.02):
        t.choose_one("op", [runner], cfg, inputs(64))
    assert "tune again to finish it" in t.explain("op", [runner], cfg, inputs(64))


def test_explaining_warns_of_nothing_and_tunes_nothing() -> None:
    import warnings

    explain = tuned()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningWarning)
        explain(100_000)


@pytest.mark.parametrize("width", [80, 120])
def test_figures_are_whole_in_any_terminal(width: int) -> None:
    candidates = tuple(
        CandidateEvidence(
            "moestro.kernels.portable.runner.PortableRunner#0123456789ab",
            -1 if n == 0 else " ".join(f"a_long_knob_{k}={n}" for k in range(6)),
            "winner" if n == 0 else "eliminated",
            median=0.0123,
            ratio=1.0 + n / 1000,
            low=0.987,
            high=1.654 + n,
            samples=12345,
            reason="slower in the screening",
            probes={
                p: {"ratio": 1.5 + n} for p in ("uniform", "zipf(1.0)", "trained(e32-k4-python@759ce30f)")
            },
        )
        for n in range(3)
    )
    record = Record((8,), candidates[0].runner, -1, "measured", evidence=Evidence(candidates))
    key: Any = SimpleNamespace(op="moe")
    table = explain(Case(key, record, {(8,): record}), width).split("Measured")[0].splitlines()
    for figure in ("12.3 ms", "1.002", "0.987 - 3.654", "12345", *(["3.500"] if width == 120 else [])):
        assert any(figure in line for line in table), figure
    assert not any("…" in line for line in table)
    folded = "".join("".join(table).split())
    assert "a_long_knob_5=2" in folded
    assert "screening" in folded

"""Tactics: the defaults always fit, the table holds what it says, and the estimate orders sensibly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, gluon_plan, tactics

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@settings(max_examples=200, deadline=None)
@given(
    experts=st.integers(1, 384),
    top_k=st.integers(1, 10),
    hidden=st.integers(1, 1000),
    inter=st.integers(1, 2000),
    num_tokens=st.integers(1, 100_000),
    fmt=st.sampled_from(["nvfp4", "bf16"]),
    deterministic=st.booleans(),
)
def test_the_default_fits_every_problem(
    experts: int, top_k: int, hidden: int, inter: int, num_tokens: int, fmt: str, deterministic: bool
) -> None:
    p = MoeProblem(
        experts, experts, 0, min(top_k, experts), hidden * 8, inter * 8, fmt, deterministic=deterministic
    )
    default = tactics.default(p, num_tokens)
    assert tactics.unfit(p, default, num_tokens) is None
    assert tactics.candidates(p, num_tokens) != []


def test_every_entry_of_the_table_is_a_candidate_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_plan, "runs_here", lambda: True)
    p = MoeProblem(8, 8, 0, 2, 4096, 14336, "nvfp4")
    for problem, entries in ((p, tactics.TABLE), (replace(p, weight_format="bf16"), tactics.OTHERS)):
        found = {t for n in (1, 8, 4096) for t in tactics.candidates(problem, n)}
        assert {tactics.fitted(p, t) for t in entries} == found


@pytest.mark.parametrize(("here", "path"), [(True, "wide"), (False, "fused")])
def test_many_pairs_of_an_expert_take_the_wide_path_where_there_is_wgmma(
    here: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon_plan, "runs_here", lambda: here)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4")
    default = tactics.default(p, 1024)
    assert default.path == path
    assert tactics.unfit(p, default, 1024) is None
    assert tactics.default(replace(p, input_format="nvfp4"), 1024).path == "fused"


@pytest.mark.parametrize(
    ("tactic", "why"),
    [
        (tactics.wide(128, (256, 1, 8, 7), (256, 1, 8, 9)), "shared memory"),
        (tactics.wide(128, (128, 1, 4, 5), (128, 1, 4, 6)), "shared memory"),  # two programs a processor
        (tactics.wide(256, (256, 1, 8, 2), (256, 1, 8, 2)), "sums than registers"),
        (tactics.wide(128, (192, 1, 8, 2), (192, 1, 8, 2)), "64 or 128 rows"),
        (replace(tactics.wide(128, (256, 1, 8, 7), (256, 1, 8, 7)), combine="atomic"), "in order"),
    ],
)
def test_wide_tiles_that_do_not_fit_say_why(
    tactic: Tactic, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon_plan, "runs_here", lambda: True)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4")
    assert why in (tactics.unfit(p, tactic, 1024) or "")


def test_steps_are_halved_until_they_divide() -> None:
    p = MoeProblem(8, 8, 0, 2, 576, 320, "nvfp4")  # 9 and 5 blocks
    fitted = tactics.fitted(p, Tactic("fused", "sorted", "reduce", 8, (64, 4, 4, 3), (64, 2, 4, 3), split=2))
    steps = (fitted.first[1], fitted.second[1], fitted.split)
    assert steps == (1, 1, 1)


def test_deterministic_problems_get_no_atomic_sums() -> None:
    p = MoeProblem(8, 8, 0, 2, 512, 256, "nvfp4", deterministic=True)
    atomic = replace(tactics.TABLE[-1], combine="atomic")
    assert "repeatable" in (tactics.unfit(p, atomic, 64) or "")


def layers() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(model, tokens) -> what was measured of it, the newest record."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in ("h100-kernels.json", "h100-few-tokens.json", "h100-tactics.json"):
        record: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in json.loads((RESULTS / name).read_text())["layers"]:
            if row["format"] == "nvfp4" and row.get("tactic"):
                record.setdefault((row["model"], row["tokens"]), []).append(row)
        found |= record
    return found


SIZES = {"qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "deepseek": (32, 8, 7168, 2048)}


def measured(model: str, num_tokens: int) -> tuple[MoeProblem, dict[Tactic, float]]:
    """(problem, tactic -> µs) as recorded on an H100."""
    experts, top_k, hidden, inter = SIZES[model]
    times = {}
    for row in layers()[model, num_tokens]:
        t = row["tactic"]
        times[Tactic(**{**t, "first": tuple(t["first"]), "second": tuple(t["second"])})] = row["us"]
    return MoeProblem(experts, experts, 0, top_k, hidden, inter, "nvfp4", device="cuda"), times


@pytest.mark.parametrize(("model", "num_tokens"), sorted(layers()))
def test_one_as_fast_as_the_measured_best_is_a_candidate_and_the_default_is_near_it(
    model: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon_plan, "runs_here", lambda: True)
    problem, times = measured(model, num_tokens)
    best = min(times, key=lambda t: times[t])
    candidates = set(tactics.candidates(problem, num_tokens))
    assert any(times[t] <= 1.01 * times[best] for t in candidates & set(times))
    default = tactics.default(problem, num_tokens)
    if num_tokens <= 64:  # the default is among the measured ones, and no worse than the spread between runs
        assert times[default] <= 1.015 * times[best]
    elif default in times:
        assert times[default] <= 1.03 * times[best]

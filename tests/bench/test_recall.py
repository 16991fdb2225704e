"""Pruning by the cost model: never a tactic that was measured to be the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moestro.bench.recall import Cell, cells_of, prune_at, worst
from moestro.cli.app import app
from moestro.errors import TuningError
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, choose
from moestro.kernels.triton.paths import fused

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RECORDED = [RESULTS / "h100-candidates.json", *sorted(RESULTS.glob("h100-tuning*.json"))]
PROBLEM = MoeProblem(128, 128, 0, 8, 2048, 768, "nvfp4", device="cuda")
T, S = Tile(32, 4, 2, 4), Tile(64, 2, 4, 4)
A, B, C = fused.tactic(8, T, T), fused.tactic(8, S, S), fused.tactic(16, S, S)


def by_table(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> float:
    """Estimates of A, B and C: 1, 1.5 and 4."""
    return {A: 1.0, B: 1.5, C: 4.0}[tactic]


def cell(a: float, b: float, c: float, default: float = 9.0) -> Cell:
    return Cell(PROBLEM, 64, {A: a, B: b, C: c}, default=default)


def test_a_cell_needs_the_factor_of_its_best_candidate() -> None:
    assert cell(1.0, 1.2, 1.3).needed(by_table) == 1.0
    assert cell(1.2, 1.0, 1.3).needed(by_table) == 1.5
    assert cell(1.2, 1.3, 1.0).needed(by_table) == 4.0
    assert cell(1.005, 1.3, 1.0).needed(by_table) == 1.0  # as fast as the best, within the noise


def test_pruning_loses_a_cell_whose_best_it_drops_unless_the_default_is_as_fast() -> None:
    cells = [cell(1.0, 2.0, 2.0), cell(2.0, 2.0, 1.0), cell(2.0, 2.0, 1.0, default=1.0)]
    found = prune_at(cells, 2.0, by_table)
    assert (found.recall, found.strict, found.kept) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 2 / 3)
    assert found.lost == (cells[1],)
    assert [needed for needed, _ in worst(cells, by_table)] == [4.0, 4.0, 1.0]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_no_measured_best_is_dropped(path: Path) -> None:
    """The recall of what was measured on an H100: at least 99 %, here all of it, without the default's help."""
    cells = cells_of(path)
    found = prune_at(cells, choose.FACTOR)
    assert len(cells) >= 20
    assert found.strict >= 0.99, [(n, c.tokens, c.problem) for n, c in worst(cells)[:3]]


def test_what_is_raced_holds_something_as_fast_as_the_best_of_all_tactics() -> None:
    """Tunings of eight models on an H200 without pruning: the default, which is always raced, counts."""
    found = prune_at(cells_of(RESULTS / "h200-tuning.json"), choose.FACTOR)
    assert found.cells >= 100
    assert found.recall >= 0.99
    assert found.strict >= 0.98


def test_a_useless_estimate_would_be_noticed() -> None:
    cells = cells_of(RECORDED[0])
    reversed_ = prune_at(cells, choose.FACTOR, lambda p, t, n: 1 / choose.cost(p, t, n))
    assert reversed_.strict < 0.9


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 700, 16384])
@pytest.mark.parametrize("format", ["nvfp4", "bf16"])
def test_what_is_worth_measuring_is_in_order_and_within_the_factor(format: str, num_tokens: int) -> None:
    dense = torch.bfloat16 if format == "bf16" else None
    p = MoeProblem(128, 128, 0, 8, 2048, 768, format, device="cuda", weight_dtype=dense)
    found = choose.worth_measuring(p, num_tokens)
    every = choose.candidates(p, num_tokens)
    costs = [choose.cost(p, tactic, num_tokens) for tactic in found]
    assert set(found) <= set(every)
    assert costs == sorted(costs)
    assert costs[-1] <= choose.FACTOR * costs[0]
    assert len(found) == sum(choose.cost(p, t, num_tokens) <= choose.FACTOR * costs[0] for t in every)


def test_the_command_shows_recall_by_factor(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "recall", str(RECORDED[0])], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert f"{choose.FACTOR:.2f} ← used" in done.output
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"models": {}, "rows": []}))
    assert CliRunner().invoke(app, ["bench", "recall", str(empty)]).exit_code == 1


def test_what_holds_no_measurements_is_an_error(tmp_path: Path) -> None:
    broken, other = tmp_path / "x.json", tmp_path / "y.json"
    broken.write_text("{")
    other.write_text("{}")
    with pytest.raises(TuningError, match="cannot be read"):
        cells_of(broken)
    with pytest.raises(TuningError, match="not a bundle"):
        cells_of(other)

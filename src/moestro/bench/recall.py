"""May candidates be pruned by the cost model? Answered from what was measured.

A cell is one layer at one number of tokens, where every candidate was measured against the default. Pruning
by a factor keeps the candidates whose estimate is within that factor of the smallest. A cell is recalled if
something that was kept is as fast as the best measured one, within the cell's noise. The default is always
raced; `recall` counts it as kept, `strict` does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.errors import TuningError
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, choose
from moestro.kernels.triton.tactics import read
from moestro.tuning.spec.plain_json import from_json
from moestro.tuning.store.bundle import read_entries
from moestro.tuning.store.store import Entry

__all__ = ["Cell", "Pruned", "cells_of", "problem_of", "prune_at", "worst"]

NOISE = 0.01  # at least; two captures of one candidate differ by as much
RUNNER = "moestro.kernels.triton.runner.TritonRunner"
Cost = Callable[[MoeProblem, Tactic, int], float]


@dataclass(frozen=True)
class Cell:
    """Measured ratios to the default (the smaller, the faster) of one layer's candidates at N tokens."""

    problem: MoeProblem
    tokens: int
    ratios: Mapping[Tactic, float]
    noise: float = NOISE
    default: float = 1.0

    @property
    def best(self) -> float:
        return min(self.default, *self.ratios.values())

    def near_best(self, ratio: float) -> bool:
        """Whether a ratio cannot be told from the best."""
        return ratio <= self.best * (1 + self.noise)

    def needed(self, cost: Cost = choose.cost) -> float:
        """The smallest factor at which something as fast as the best candidate (not the default) is kept."""
        estimates = {tactic: cost(self.problem, tactic, self.tokens) for tactic in self.ratios}
        fastest = min(self.ratios.values())
        near = [t for t, ratio in self.ratios.items() if ratio <= fastest * (1 + self.noise)]
        return min(estimates[t] for t in near) / min(estimates.values())


@dataclass(frozen=True)
class Pruned:
    """What pruning by a factor does to cells."""

    factor: float
    cells: int
    recall: float  # share of cells in which something as fast as the best is still raced
    strict: float  # the same without the default
    kept: float  # share of the candidates
    lost: tuple[Cell, ...]  # what recall misses


def prune_at(cells: Sequence[Cell], factor: float, cost: Cost = choose.cost) -> Pruned:
    """Prune every cell by a factor of the smallest estimate."""
    lost, strict, kept, candidates = [], 0, 0, 0
    for cell in cells:
        estimates = {tactic: cost(cell.problem, tactic, cell.tokens) for tactic in cell.ratios}
        limit = factor * min(estimates.values())
        left = [tactic for tactic, estimate in estimates.items() if estimate <= limit]
        found = cell.needed(cost) <= factor
        strict += found
        kept += len(left)
        candidates += len(estimates)
        if not (found or cell.near_best(cell.default)):
            lost.append(cell)
    count = max(1, len(cells))
    return Pruned(
        factor, len(cells), 1 - len(lost) / count, strict / count, kept / max(1, candidates), tuple(lost)
    )


def cells_of(source: Path) -> list[Cell]:
    """The cells of the Triton backend in a store's folder, a bundle's file, or what benchmarks/gpu_kernels.py
    wrote. Raises TuningError for anything else.
    """
    if source.is_file() and (rows := _rows(source)) is not None:
        return rows
    return [cell for entry in read_entries(source) if (cell := _cell(entry)) is not None]


def _rows(path: Path) -> list[Cell] | None:
    """The cells of {"models": {name: [L, K, H, I]}, "rows": [{model, format, tokens, us, tactic}]}, all pairs
    local, SiLU; None for another file. Times there have no default to be ratios of: the best is 1.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or "models" not in data:
        return None
    times: dict[tuple[str, str, int], dict[Tactic, float]] = {}
    for row in data["rows"]:
        tactic = read(row.get("tactic") or {})
        if tactic is None:
            continue  # a baseline, or a tactic that there is no longer
        cell = times.setdefault((row["model"], row["format"], int(row["tokens"])), {})
        cell[tactic] = min(float(row["us"]), cell.get(tactic, math.inf))
    cells = []
    for (model, format, tokens), measured in times.items():
        experts, top_k, hidden, inter = data["models"][model]
        dense = torch.bfloat16 if format == "bf16" else None
        problem = MoeProblem(
            experts, experts, 0, top_k, hidden, inter, format, device="cuda", weight_dtype=dense
        )
        best = min(measured.values())
        ratios = {tactic: us / best for tactic, us in measured.items()}
        if len(ratios) > 1:
            cells.append(Cell(problem, tokens, ratios, default=math.inf))
    return cells


def _cell(entry: Entry) -> Cell | None:
    """A decision's evidence; None if it is of another backend, or of two finalists only."""
    runners = [r for r in entry.key["runners"] if r["class"] == RUNNER]
    record = entry.data["record"]
    if not runners or record["learned"]:
        return None
    evidence = record["evidence"]
    ratios = {}
    for c in evidence["candidates"]:
        if c["ratio"] is not None and c["runner"].startswith(RUNNER) and c["tactic"] != -1:
            tactic = from_json(c["tactic"])
            if isinstance(tactic, Tactic):
                ratios[tactic] = float(c["ratio"])
    if len(ratios) < 2:
        return None
    problem = problem_of(runners[0]["config"]["problem"]["fields"])
    (tokens,) = record["bucket"]
    return Cell(problem, int(tokens), ratios, max(NOISE, float(evidence["noise_floor"])))


def problem_of(fields: Mapping[str, Any]) -> MoeProblem:
    """The problem whose fields a tuning key holds."""
    made = {name: _value(value) for name, value in fields.items()}
    return MoeProblem(**made)


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and str(value.get("text", "")).startswith("torch."):
        return getattr(torch, value["text"].removeprefix("torch."))
    return from_json(value)


def worst(cells: Iterable[Cell], cost: Cost = choose.cost) -> list[tuple[float, Cell]]:
    """Cells by the factor that they need, the largest first."""
    return sorted(((cell.needed(cost), cell) for cell in cells), key=lambda pair: -pair[0])

"""gpu_served.py skew RECORD: what gpu_record.py's skewed steps recorded, beside the peers and beside the floors.

For each model, number of tokens and skewed routing: the fastest peer's time over ours (above 1: we are faster), our
time over that under uniform routing (the same number of pairs, the same run), and the same ratio of floors. The floor
is docs/kernels.md's: the sum over experts of max(bytes / 4.2 TB/s, FLOP / 790 TFLOP/s), NVFP4. A cell holds where we are
faster than every peer and take at most 1.12 of uniform routing's time, or the ratio of floors where that is more.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from gpu_plan import SKEWED
from gpu_served import Rows, Target

from moestro.bench import results
from moestro.bench.results import BenchResult
from moestro.routing import parse

BYTES_PER_S, FLOPS_PER_S, BYTES = 4.2e12, 790e12, 0.5625  # an H200's; of an NVFP4 weight with its scales
BOUND, UNIFORM = 1.12, "uniform"
ROUTINGS = {parse(text).name: parse(text) for text in (UNIFORM, *SKEWED)}


def skew(rows: Rows) -> int:
    """A row a cell, and a table of them."""
    found = json.loads(rows.options.record.read_text())["results"]
    by_step: dict[str, dict[str, BenchResult]] = {}
    for name, one in found.items():
        result = results.parse(one, rows.options.record)
        by_step.setdefault(name.split()[0], {})[result.conditions["routing"]] = result
    for step, by_routing in by_step.items():
        base = by_routing.get(UNIFORM)
        if base is None or len(by_routing) < 2:
            continue
        for routing in by_routing:
            if routing != UNIFORM:
                _cells(rows, step, by_routing[routing], base)
    print(*table(rows.rows), sep="\n")
    return rows.judged(Target("of_bound", 1.0))


def _cells(rows: Rows, step: str, result: BenchResult, base: BenchResult) -> None:
    for tokens in result.tokens:
        ours = [(_best(one, tokens, ours=True), _best(one, tokens, ours=False)) for one in (result, base)]
        (mine, peer), (uniform, _) = ours
        if mine is None or uniform is None:
            continue
        floors = floor(result, tokens) / floor(base, tokens)
        slower, behind = mine / uniform, 0.0 if peer is None else mine / peer
        rows.add(
            step=step,
            routing=result.conditions["routing"],
            tokens=tokens,
            us=mine * 1e6,
            uniform_us=uniform * 1e6,
            peer_us=None if peer is None else peer * 1e6,
            peer_over_ours=None if peer is None else peer / mine,
            of_uniform=slower,
            floor_of_uniform=floors,
            of_bound=max(slower / max(BOUND, floors), behind),
        )


def _best(result: BenchResult, tokens: int, ours: bool) -> float | None:
    """Seconds of the fastest whole layer of ours, or of peers."""
    rows = [r for r in result.rows if r.tokens == tokens and r.ours == ours and "part" not in r.facts]
    return min((r.median_s for r in rows), default=None)


def floor(result: BenchResult, tokens: int) -> float:
    """Seconds that the loads of a case cannot go below, as the bench drew it."""
    p: dict[str, Any] = result.problem
    experts = p["num_local_experts"] if p["local_pairs"] else p["num_experts"]
    seed = result.conditions["seed"] + tokens
    ids = ROUTINGS[result.conditions["routing"]].sample(tokens, experts, p["top_k"], seed=seed)
    loads = torch.bincount(ids.flatten(), minlength=experts)[: p["num_local_experts"]].double()
    weights = 3 * p["hidden_size"] * p["intermediate_size"]  # gate, up, down
    products = 2 * weights * loads / FLOPS_PER_S
    read = weights * BYTES / BYTES_PER_S * (loads > 0)
    return float(torch.maximum(products, read).sum())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line a model and routing; a cell is peer/ours, time/uniform (floor/uniform)."""
    sizes = sorted({row["tokens"] for row in rows})
    lines = ["| peer/ours, time/uniform (floor) | " + " | ".join(f"N={n}" for n in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for step, routing in dict.fromkeys((row["step"], row["routing"]) for row in rows):
        cells = {r["tokens"]: r for r in rows if (r["step"], r["routing"]) == (step, routing)}
        words = [_cell(cells[n]) if n in cells else "–" for n in sizes]
        lines.append(f"| {step} {routing} | " + " | ".join(words) + " |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    ahead = "–" if row["peer_over_ours"] is None else f"{row['peer_over_ours']:.2f}"
    mark = "" if row["of_bound"] <= 1 else " !"
    return f"{ahead}, {row['of_uniform']:.2f} ({row['floor_of_uniform']:.2f}){mark}"

"""`moestro bench recall`: how far candidates may be pruned by the cost model, from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moestro.cli.console import output

__all__ = ["recall"]

FACTORS = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 3.0)


def recall(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|DIR ...", help="Stores, bundles, or what benchmarks/gpu_kernels.py --json wrote."
        ),
    ],
    show: Annotated[int, typer.Option("--worst", min=0, help="Cells that need the largest factors.")] = 5,
) -> None:
    """Would the cost model have dropped the best candidate? Per factor of pruning, over measured cells.

    Exit status 1 if pruning as it is done loses more than 1 % of the cells.
    """
    from moestro.bench import recall as runs
    from moestro.bench.contenders import tactic_words
    from moestro.errors import MoestroError
    from moestro.kernels.triton import choose

    cells = [cell for source in sources for cell in runs.cells_of(source)]
    if not cells:
        raise MoestroError(f"recall: no measured candidates of the Triton backend in {sources[0]}")
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for title in ("factor", "recall", "without the default", "candidates kept"):
        table.add_column(title, justify="right")
    for factor in sorted({*FACTORS, choose.FACTOR}):
        found = runs.prune_at(cells, factor)
        used = " ← used" if factor == choose.FACTOR else ""
        table.add_row(
            f"{factor:.2f}{used}",
            f"{100 * found.recall:.1f}%",
            f"{100 * found.strict:.1f}%",
            f"{100 * found.kept:.0f}%",
        )
    output.print(table)
    for needed, cell in runs.worst(cells)[:show]:
        best = min(cell.ratios, key=cell.ratios.__getitem__)
        p = cell.problem
        output.print(
            f"needs {needed:.2f}: {p.weight_format} L{p.num_local_experts} K{p.top_k} H{p.hidden_size} "
            f"I{p.intermediate_size}, N = {cell.tokens}: {tactic_words(best)}",
            markup=False,
        )
    if runs.prune_at(cells, choose.FACTOR).recall < 0.99:
        raise typer.Exit(1)

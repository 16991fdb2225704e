"""`moestro inspect`: what is in a checkpoint, and what will run it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moestro.cli.console import output
from moestro.machine import bytes_text

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a checkpoint.")],
    device: Annotated[str, typer.Option("--device", help="Where it is to run: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Layouts, sizes, memory and backends, layer by layer, and what other engines get wrong with such checkpoints."""
    from moestro import checkpoints

    found = checkpoints.inspect(path, device)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    output.print(f"[bold]{found.path}[/]: {found.scheme or 'unquantised'}")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("experts", "layout", "format", "E", "H", "I", "memory", "backend"):
        table.add_column(title, overflow="fold")
    for layer in found.layers:
        sizes = (layer.num_experts, layer.hidden_size, layer.intermediate_size)
        extra = " biases" if layer.biased else ""
        gate = "" if layer.gated else " no gate"
        row = (layer.prefix, layer.layout + extra + gate, layer.format, *map(str, sizes))
        table.add_row(*row, bytes_text(layer.nbytes), layer.backend)
    output.print(table)
    reasons = {f"{name}: {reason}" for layer in found.layers for name, reason in layer.why_not.items()}
    for line in sorted(reasons):
        output.print(f"[dim]not {line}[/]")
    output.print(f"experts {bytes_text(found.expert_bytes)}, everything else {bytes_text(found.other_bytes)}")
    if found.quantised_modules:
        kinds = sorted(set(found.quantised_modules.values()))
        output.print(f"{len(found.quantised_modules)} other modules are quantised: {', '.join(kinds)}")
    for fault in found.faults:
        output.print(f"[yellow]known fault of others:[/] {fault}")

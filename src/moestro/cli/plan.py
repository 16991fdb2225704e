"""`moestro plan`: how long an MoE layer would take on so many GPUs, before there are any."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli import options as opt
from moestro.cli.console import output, seconds_text
from moestro.cli.deliver import write_results

__all__ = ["EXAMPLES", "plan"]

EXAMPLES = """
[bold]Examples[/]

[cyan]moestro plan --model deepseek-v3 --gpus 8 --gpu h100 --tokens 4096 --routing zipf[/]
  one to eight GPUs, with and without copies of the hot experts

[cyan]moestro plan --model qwen3-235b-a22b --gpus 4 --gpu h200 --tokens 64 --replicas 0,8[/]
  decoding on four
"""

GpusOption = Annotated[
    int, typer.Option("--gpus", min=1, help="GPUs of one host: 1, 2, 4 ... up to so many ranks.")
]
GpuOption = Annotated[str, typer.Option("--gpu", metavar="NAME", help="h100 or h200.")]
PlanTokensOption = Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens a rank in one step.")]
PlanReplicasOption = Annotated[
    str, typer.Option("--replicas", metavar="LIST", help="Copies of hot experts, all ranks together.")
]
OneFormatOption = Annotated[
    str, typer.Option("--format", "-f", metavar="NAME", help="nvfp4, mxfp4, fp8_block, int4 or bf16.")
]


def plan(
    model: opt.ModelOption = None,
    sizes: opt.SizesOption = None,
    gpus: GpusOption = 8,
    gpu: GpuOption = "h100",
    tokens: PlanTokensOption = 4096,
    routing: opt.RoutingOption = "uniform",
    replicas: PlanReplicasOption = "0,16",
    format: OneFormatOption = "nvfp4",
    seed: opt.SeedOption = 0,
    json_file: opt.JsonOption = None,
) -> None:
    """Expected time, memory and imbalance of expert parallelism, from measured decisions and bandwidths.

    step: the slowest rank's experts, and links (sending tokens and results); load: its pairs over the mean; GiB and
    tokens/s: of one GPU, for this layer (red: more than it has). "fitted" rows are of numbers of ranks that were
    run; "on paper" ones were not. docs/distributed.md tells the error.
    """
    shape = opt.parse_shape(model, sizes)
    copies = _numbers(replicas)
    from moestro.parallel import planner

    layer = planner.PlannedLayer(
        shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size, shape.gated, format
    )
    with opt.usage("--gpu / --format / --gpus"):
        counts = [n for n in (1 << k for k in range(20)) if n < gpus] + [gpus]
        rows = planner.plan(layer, gpu, counts, tokens, opt.parse_routing(routing), copies, seed)
    output.print(
        f"{shape.describe()}, {format}, {tokens} tokens a rank, {routing} routing, {gpu}", highlight=False
    )
    output.print(_table(rows, tokens))
    there = {(row.ranks, row.replicas) for row in rows}
    if left := [f"{c} on {n} ranks" for n in counts for c in copies if n > 1 and (n, c) not in there]:
        output.print(f"[dim]left out, more than a copy on every rank: {', '.join(left)}[/]", highlight=False)
    fastest = planner.best(rows)
    output.print(_verdict(fastest, tokens), highlight=False)
    if json_file is not None:
        _write(json_file, rows, layer, {"gpu": gpu, "tokens": tokens, "routing": routing})


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"expected numbers like 0,16, got {text!r}", param_hint="--replicas")
    return sorted({int(part) for part in parts})


def _table(rows: list[Any], tokens: int) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("ranks", "copies", "way", "step", "experts", "links", "load", "GiB", "tokens/s", "")
    for name in names:
        table.add_column(name, justify="left" if name in ("way", "") else "right", no_wrap=True)
    for row in rows:
        memory = f"{(row.weight_bytes + row.buffer_bytes) / 2**30:.1f}"
        table.add_row(
            *(str(row.ranks), str(row.replicas), row.way, *map(seconds_text, (row.total, row.products))),
            *(seconds_text(row.send + row.back) if row.ranks > 1 else "-", f"{row.imbalance:.2f}"),
            *(memory if row.fits else f"[red]{memory}[/]", f"{row.tokens_per_s(tokens):,.0f}"),
            f"[dim]{row.basis}[/]",
        )
    return table


def _verdict(row: Any, tokens: int) -> str:
    if row is None:
        return "nothing fits into memory"
    copies = f" with {row.replicas} copies of hot experts" if row.replicas else ""
    return (
        f"most tokens a GPU: {row.ranks} rank{'s' * (row.ranks > 1)}, {row.way}{copies}: "
        f"{row.tokens_per_s(tokens):,.0f} tokens/s a GPU and layer ({row.basis})"
    )


def _write(path: Path, rows: list[Any], layer: Any, conditions: dict[str, Any]) -> None:
    from moestro.bench import results

    write_results(
        path,
        {
            "schema": "moestro.plan/1",
            "command": results.command_line(),
            "date": results.now(),
            "layer": dataclasses.asdict(layer),
            "conditions": conditions,
            "rows": [{**dataclasses.asdict(row), "total": row.total} for row in rows],
        },
    )

"""`moestro explain`: a stored decision in words: what was chosen and why, and what would change it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.cache import EnvironmentOption, OpOption, StoreOption, screen
from moestro.cli.console import output
from moestro.cli.options import usage
from moestro.cli.tactics import load_tactics

__all__ = ["app", "explain"]

EXAMPLES = """
[bold]Examples[/]

[cyan]moestro explain --tokens 3000[/]
  what serves 3000 tokens, in every layer that the store knows

[cyan]moestro explain --store tuned --op "moestro.*" --match '"num_experts", 128' --tokens 64[/]
  of layers whose key holds that text

[cyan]moestro explain --vllm server.log[/]
  what served in vLLM, what was left to it, and sizes beyond what was tuned
"""


def explain(
    store: StoreOption = None,
    op: OpOption = "*",
    environment: EnvironmentOption = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", "-n", metavar="N[xM]", help="The size that is asked for; else every decision."
        ),
    ] = None,
    match: Annotated[
        str, typer.Option("--match", metavar="TEXT", help="Only keys whose JSON holds this text.")
    ] = "",
    vllm: Annotated[
        Path | None,
        typer.Option(
            "--vllm",
            metavar="LOG",
            help="A vLLM server's log, or a folder of logs: what served in it. Nothing else is asked for then.",
        ),
    ] = None,
    width: Annotated[int | None, typer.Option("--width", min=60, help="Columns.", hidden=True)] = None,
) -> None:
    """Why a runner and tactic were chosen: their times, the runners-up with intervals, the noise floor, the
    probes, the environment, and what would change the choice.
    """
    if vllm is not None:
        _vllm(vllm)
        return
    from moestro.tuning.show.explain import Case
    from moestro.tuning.show.explain import explain as text_of
    from moestro.tuning.show.families import families, parse_sizes
    from moestro.tuning.store.store import Store, default_root

    load_tactics()
    if store is not None and not store.is_dir():
        raise typer.BadParameter(f"no such folder: {store}", param_hint="--store")
    source = Store(store if store is not None else default_root())
    with usage("--tokens"):
        sizes = parse_sizes(tokens) if tokens is not None else None
    found = families(source.entries(), op, environment or (), match)
    if sizes is not None:
        found = [f for f in found if f.dynamic == len(sizes)]
    if not found:
        output.print(f"{source.root} has no decisions that match", markup=False)
        raise typer.Exit(1)
    console = screen()
    for family in found:
        console.print(f"\n{family.title}", style="bold", markup=False)
        every = [(record, True) for record in family.records.values()]
        for record, within in [family.find(sizes)] if sizes is not None else every:
            case = Case(
                family.key,
                record,
                family.records,
                sizes,
                within,
                str(source.root),
                source.facts(family.environment),
            )
            console.print(
                text_of(case, width or min(console.width, 120)), markup=False, highlight=False, soft_wrap=True
            )


def _vllm(log: Path) -> None:
    from moestro.integrations.vllm import served

    for line in served.explain(served.read(log)):
        output.print(line, markup=False, highlight=False, soft_wrap=True)


app = typer.Typer(rich_markup_mode="rich")
app.command("explain", epilog=EXAMPLES)(explain)

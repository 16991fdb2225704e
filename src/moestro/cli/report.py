"""`moestro report`: report.html from bench results and a store of decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.console import output
from moestro.cli.options import writable
from moestro.cli.tactics import load_tactics

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BENCH.json]…", help="Results of [bold]moestro bench --json[/]."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Store of decisions: adds the tuner's plots."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", callback=writable, help="Where to write.")
    ] = Path("report.html"),
) -> None:
    """A self-contained page of plots: latency, ratio to the best peer, roofline; and what the tuner chose
    and why.

    [bold]Examples[/]

    [cyan]moestro report out.json[/]
      from one bench run

    [cyan]moestro report a.json b.json --store demo/store -o demo/report.html[/]
      from several, with the tuner's decisions
    """
    from moestro.bench import worst as files
    from moestro.bench.report import write_report

    if not results and store is None:
        raise typer.BadParameter("give bench results, a --store, or both", param_hint="[BENCH.json]…")
    if store is not None and not store.is_dir():
        raise typer.BadParameter(f"no such folder: {store}", param_hint="--store")
    load_tactics()
    write_report(out, [one for path in results or [] for one in files.read(path)], store)
    output.print(f"wrote {out}")

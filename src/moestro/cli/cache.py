"""`moestro cache`: look into a store of decisions, carry it elsewhere, compare two, clear parts of one."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moestro.cli.console import output
from moestro.cli.options import usage
from moestro.cli.tactics import load_tactics

if TYPE_CHECKING:
    from moestro.tuning.store.store import Entry, Store

__all__ = ["app", "screen"]

app = typer.Typer(
    no_args_is_help=True,
    help="The store of tuning decisions: list, show, export, import, diff, prune.",
    rich_markup_mode="rich",
)

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Folder of decisions; by default $MOESTRO_STORE or yours. list and show take a bundle as well.",
    ),
]
OpOption = Annotated[
    str, typer.Option("--op", metavar="PATTERN", help="Only these operations, as in a shell.")
]
EnvironmentOption = Annotated[
    list[str] | None,
    typer.Option("--environment", "-e", metavar="PATTERN", help="Only these environments; may be repeated."),
]


def screen() -> Console:
    """The terminal, or something as wide as tables need where output is piped."""
    return output if output.is_terminal else Console(width=160)


def _store(path: Path | None) -> Store:
    from moestro.tuning.store.store import Store, default_root

    return Store(path if path is not None else default_root())


def _entries(store: Store, path: Path | None, kinds: tuple[str, ...] = ("decision",)) -> list[Entry]:
    """Of a store, or of the bundle that stands where a store is asked for."""
    from moestro.tuning.store.bundle import read_entries

    return read_entries(path, kinds) if path is not None and path.is_file() else store.entries(kinds)


@app.command("list")
def list_(store: StoreOption = None) -> None:
    """Environments and operations, with how much is known of each."""
    from rich import box
    from rich.table import Table

    from moestro.tuning.show.explain import age_text

    source = _store(store)
    entries = _entries(source, store, ("decision", "quarantine", "miss"))
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    newest: dict[tuple[str, str], float] = {}
    for entry in entries:
        where = (entry.environment, entry.op)
        counts[where][entry.kind] += 1
        newest[where] = max(newest.get(where, 0.0), entry.created)
    if not counts:
        output.print(f"{source.root} holds no decisions", markup=False)
        return
    table = Table("environment", "operation", box=box.SIMPLE_HEAD)
    for name in ("decisions", "quarantine", "misses", "newest"):
        table.add_column(name, justify="right")
    for where in sorted(counts):
        found = counts[where]
        cells = [str(found[kind] or "") for kind in ("decision", "quarantine", "miss")]
        table.add_row(*where, *cells, age_text(newest[where]))
    output.print(str(source.root), markup=False)
    screen().print(table)


@app.command("show")
def show(store: StoreOption = None, op: OpOption = "*", environment: EnvironmentOption = None) -> None:
    """Every decision: size, runner, tactic, its time over the default's, and what measured it."""
    from rich import box
    from rich.table import Table

    from moestro.tuning.show.explain import age_text, ratio_text, runner_text, seconds_text, tactic_text
    from moestro.tuning.show.families import families

    load_tactics()
    source = _store(store)
    entries = _entries(source, store)
    found = families(entries, op, environment or ())
    if not found:
        here = "" if entries else f" {source.root} is no store of decisions, or an empty one."
        output.print(f"no decisions match.{here}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    for family in found:
        table = Table(box=box.SIMPLE_HEAD, title=family.title, title_justify="left", title_style="bold")
        table.add_column("size", justify="right")
        for name in ("runner", "tactic"):
            table.add_column(name)
        for name in ("time", "ratio", "interval", "age"):
            table.add_column(name, justify="right")
        table.add_column("note")
        for record in family.records.values():
            won = record.evidence.of(record.runner, record.tactic)
            interval = f"{ratio_text(won.low)} - {ratio_text(won.high)}" if won and won.low else ""
            notes = [record.status] * (record.status != "measured")
            notes += ["learned"] * record.learned + ["unfinished"] * (not record.complete)
            table.add_row(
                " x ".join(map(str, record.bucket)),
                runner_text(record.runner),
                tactic_text(record.tactic).replace("[", r"\["),
                seconds_text(won.median if won else None),
                ratio_text(won.ratio if won else None),
                interval,
                age_text(record.created),
                ", ".join(notes),
            )
        screen().print(table)


@app.command("export")
def export(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE.json", help="Where to write.")],
    store: StoreOption = None,
    op: OpOption = "*",
    environment: EnvironmentOption = None,
    slim: Annotated[bool, typer.Option("--slim", help="Evidence of winners and defaults only.")] = False,
    loose: Annotated[
        list[str] | None,
        typer.Option(
            "--loose",
            metavar="FACT",
            help="For bundles that ship with the package: a fact of a key that a layer may have otherwise "
            "(mode, cuda_graph); repeat for several.",
        ),
    ] = None,
) -> None:
    """Write decisions and quarantine into one file, to bake into an image or to send."""
    from moestro.tuning.store.bundle import export_bundle

    count = export_bundle(_store(store), bundle, environment or ("*",), op, slim=slim, loose=loose or ())
    output.print(f"{bundle}: {count} decisions", markup=False)


@app.command("import")
def import_(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE.json", help="A bundle, or FlashInfer's tuning file.")
    ],
    store: StoreOption = None,
    flashinfer: Annotated[
        bool,
        typer.Option(
            "--flashinfer", help="The file is of FlashInfer's autotuner: its winners are tried first."
        ),
    ] = False,
) -> None:
    """Take a bundle's decisions into the store; what the store has of newer date stays."""
    from moestro.tuning.store.bundle import import_bundle
    from moestro.tuning.store.flashinfer import import_flashinfer

    target = _store(store)
    if flashinfer:
        output.print(f"{import_flashinfer(bundle, target)} hints taken into {target.root}", markup=False)
        return
    taken, left = import_bundle(bundle, target)
    kept = f"; {left} left out, as new in the store" if left else ""
    output.print(f"{taken} entries taken into {target.root}{kept}", markup=False)


@app.command("convert")
def convert(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE.json", help="A bundle of this or an older form.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT.json", help="Where to write; the file itself if left out.")
    ] = None,
    slim: Annotated[bool, typer.Option("--slim", help="Evidence of winners and defaults only.")] = False,
) -> None:
    """Write a bundle, or recorded evidence, as tables: one row a line, four significant digits."""
    from moestro.tuning.store.bundle import convert as write

    where = bundle if target is None else target
    count = write(bundle, where, slim=slim)
    output.print(f"{where}: {count} decisions, {where.stat().st_size // 1000} kB", markup=False)


@app.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(help="A store's folder or a bundle.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
    op: OpOption = "*",
) -> None:
    """Where two stores or bundles answer differently. Exit status 0 also if they do."""
    from rich import box
    from rich.table import Table

    from moestro.tuning.show.explain import ratio_text, runner_text, tactic_text
    from moestro.tuning.store.bundle import diff as compare

    load_tactics()
    different, same = compare(one, other, op)
    table = Table("operation", "size", one.name, other.name, box=box.SIMPLE_HEAD)
    for d in different:
        cells = []
        for record in (d.one, d.other):
            won = record.evidence.of(record.runner, record.tactic) if record is not None else None
            what = f"{runner_text(record.runner)} {tactic_text(record.tactic)}" if record is not None else "-"
            cells.append(f"{what}  {ratio_text(won.ratio if won else None)}".strip().replace("[", r"\["))
        table.add_row(d.op, " x ".join(map(str, d.bucket)), *cells)
    if different:
        screen().print(table)
    output.print(f"{len(different)} differ, {same} agree", markup=False)


@app.command("prune")
def prune(
    store: StoreOption = None,
    environment: EnvironmentOption = None,
    op: OpOption = "*",
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, metavar="DAYS", help="Only what is at least so old."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="decision, quarantine or miss; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete decisions, quarantine or misses that match all conditions. At least one must be given."""
    from moestro.errors import TuningError, unknown_name
    from moestro.tuning.store.bundle import prune as delete
    from moestro.tuning.store.store import KINDS

    source = _store(store)
    with usage("--kind"):
        for name in kind or ():
            if name not in KINDS:
                raise TuningError(unknown_name("--kind", name, KINDS))
    with usage("--environment / --older-than / --op / --kind"):
        gone = delete(
            source,
            environments=environment or (),
            older_than_days=older_than,
            kinds=tuple(kind or sorted(KINDS)),
            op=op,
            dry_run=dry_run,
        )
    output.print(
        f"{len(gone)} files {'would be ' if dry_run else ''}deleted from {source.root}", markup=False
    )

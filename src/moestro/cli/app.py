"""The command `moestro`: the app, how errors look, and the exit statuses.

0: done. 1: a failure of ours, or results that could not be kept, which are shown first (one message; --debug shows
the traceback). 2: wrong usage. 130: interrupted, with what was measured kept. Commands live beside this file and
import torch only when they run.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moestro.cli import bench, cache, convert, doctor, explain, inspect, plan, record, report, tune
from moestro.cli.console import errors, plain_warnings
from moestro.errors import MoestroError

__all__ = ["app", "main"]

ORDER = (
    "doctor",
    "inspect",
    "convert",
    "record",
    "tune",
    "bench",
    "explain",
    "cache",
    "report",
    "plan",
)  # as --help lists them: the order of use


class MoestroGroup(TyperGroup):
    """Shows our errors as one message; takes --debug anywhere on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = {"debug": "--debug" in args}
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def list_commands(self, ctx: Any) -> list[str]:
        known = super().list_commands(ctx)
        return [name for name in ORDER if name in known] + [name for name in known if name not in ORDER]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.obj["debug"] or not (isinstance(error, MoestroError) or _out_of_memory(error)):
                raise
            errors.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
            errors.print(str(error), markup=False, highlight=False)
            errors.print("[dim]--debug shows where it happened[/]", highlight=False)
            raise typer.Exit(1) from error


def _out_of_memory(error: Exception) -> bool:
    from moestro.tuning.measure.request import is_out_of_memory

    return is_out_of_memory(error)


app = typer.Typer(
    cls=MoestroGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Fused Mixture-of-Experts layers, and the autotuner that keeps them fast.",
    epilog="Start with [bold]moestro doctor[/], then [bold]moestro bench --model qwen3-30b-a3b[/].",
)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.add_typer(bench.app, name="bench")
app.command("explain", epilog=explain.EXAMPLES)(explain.explain)
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("record")(record.record)


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(f"moestro {metadata.version('moestro')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the console script. A request to end (SIGTERM) is taken as Ctrl-C: what is measured is kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plain_warnings()
    app(prog_name="moestro")

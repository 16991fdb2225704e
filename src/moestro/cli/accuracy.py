"""`moestro bench --accuracy`: what each format costs in accuracy, on a layer and on a model's next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moestro.cli.console import output, progress, quiet
from moestro.cli.deliver import every, write_results
from moestro.machine import bytes_text

if TYPE_CHECKING:
    from moestro.bench.accuracy import AccuracyResult, LayerRow
    from moestro.bench.model_accuracy import ModelRow
    from moestro.bench.models import MoeShape
    from moestro.routing import Distribution

__all__ = [
    "AccuracyOption",
    "AccuracySpec",
    "InputFormatOption",
    "ModelDirOption",
    "TextOption",
    "accuracy_view",
    "measure",
    "only_with_accuracy",
    "parse_inputs",
]

PANEL = "Accuracy"
LAYER_LEGEND = (
    "error: distance of the result to the exact product of the format's weights with x as it is. own: to the "
    "reference with the same roundings. weights: what the format's weights cost against bf16 ones, exact product "
    "against exact product. Relative error norms.\n"
)
MODEL_LEGEND = (
    "KL: nats a token, from the next token's distribution in float32. top 1: tokens with the same most likely "
    "successor. experts: bytes of all layers'."
)

AccuracyOption = Annotated[
    bool,
    typer.Option(
        "--accuracy",
        rich_help_panel=PANEL,
        help="Measure no time but how exact each format of weights and activations is; at one number of --tokens.",
    ),
]
ModelDirOption = Annotated[
    Path | None,
    typer.Option(
        "--model-dir",
        metavar="DIR",
        rich_help_panel=PANEL,
        help="With --accuracy: a dense checkpoint, whose next tokens are compared, too.",
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        rich_help_panel=PANEL,
        help="With --model-dir: the text; default: DIR/held_out.txt.",
    ),
]
InputFormatOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-format",
        metavar="NAME",
        help="Of activations: none, nvfp4, fp8, int8; repeat for several. Default: none, with --accuracy all.",
    ),
]


@dataclass(frozen=True)
class AccuracySpec:
    """What to measure. shape: of the layer, if one is to be; model_dir and text: of the model, if one is to be."""

    shape: MoeShape | None
    model_dir: Path | None
    text: Path | None
    formats: tuple[str, ...]
    inputs: tuple[str, ...]
    routing: Distribution
    tokens: int
    backend: str
    device: str
    seed: int


def parse_inputs(names: list[str] | None, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Formats of activations, each once; all by default. A usage error for an unknown one."""
    from moestro.bench.accuracy import INPUTS
    from moestro.cli.options import usage
    from moestro.errors import FormatError, unknown_name

    with usage("--input-format"):
        for name in names or ():
            if name not in INPUTS:
                raise FormatError(unknown_name("input_format", name, INPUTS))
    return tuple(dict.fromkeys(names or default or INPUTS))


def only_with_accuracy(given: dict[str, Any]) -> None:
    """A usage error for an option that means nothing without --accuracy."""
    for name, value in given.items():
        if value:
            raise typer.BadParameter("goes with --accuracy", param_hint=name)


def measure(spec: AccuracySpec, json_file: Path | None) -> None:
    """Measure, print, write. Ctrl-C keeps what was measured, with exit status 130."""
    from moestro.bench import accuracy, results

    conditions = {
        "routing": spec.routing.name,
        "tokens": spec.tokens,
        "seed": spec.seed,
        "backend": spec.backend,
    }
    result = accuracy.new_result(results.command_line(), spec.device, spec.shape, conditions)
    interrupted = False

    def run() -> None:
        nonlocal interrupted
        try:
            with progress() as bar, quiet():
                task = bar.add_task("accuracy", total=None)
                _measured(spec, result, lambda what: bar.update(task, description=what))
        except KeyboardInterrupt:
            interrupted = True

    every(
        run,
        lambda: write_results(json_file, result.to_json()),
        lambda: output.print(accuracy_view(result)),
    )
    if interrupted:
        raise typer.Exit(130)


def _measured(spec: AccuracySpec, result: AccuracyResult, step: Any) -> None:
    """Adds the rows to the result one by one: what is in it stays if the run breaks off."""
    from moestro.bench import accuracy, model_accuracy

    if spec.shape is not None:
        rows = accuracy.layer_rows(
            spec.shape, spec.formats, spec.inputs, spec.routing,
            tokens=spec.tokens, backend=spec.backend, device=spec.device, seed=spec.seed, step=step,
        )  # fmt: skip
        for row in rows:
            result.layer.append(row)
    if spec.model_dir is not None:
        step("reference model")
        known = model_accuracy.open_model(spec.model_dir, spec.text or spec.model_dir / "held_out.txt")
        result.reference.update(known.to_json())  # in place: kept if the run breaks off
        for one in model_accuracy.model_rows(
            known, spec.formats, spec.inputs, backend=spec.backend, step=step
        ):
            result.model.append(one)


def accuracy_view(result: AccuracyResult) -> RenderableType:
    """The tables, and what did not run."""
    parts: list[RenderableType] = []
    if result.layer:
        problem = result.problem or {}
        title = "{name}  E{num_experts} K{top_k} H{hidden_size} I{intermediate_size}".format(**problem)
        where = f" · {result.conditions['tokens']} tokens, routing {result.conditions['routing']}"
        parts += [Text(title + where, style="bold"), _layer_table(result.layer), Text(LAYER_LEGEND, "dim")]
    if result.reference:
        known = result.reference
        title = (
            f"{known['folder']} · {known['tokens']} tokens · perplexity in float32 {known['perplexity']:.4f}"
        )
        parts += [Text(title, style="bold"), _model_table(result.model, known["perplexity"])]
        parts.append(Text(MODEL_LEGEND, "dim"))
    for row in (*result.layer, *result.model):
        if row.reason:
            parts.append(Text(f"{row.format}, activations {row.input_format} not run: {row.reason}", "dim"))
    return Group(*parts)


def _layer_table(rows: Sequence[LayerRow]) -> Table:
    table = _table("error", "own", "weights")
    for row in rows:
        if row.error is not None and row.own is not None and row.weights is not None:
            runs_on = row.backend if row.arithmetic is None else f"{row.backend} ({row.arithmetic})"
            figures = (f"{value:.2e}" for value in (row.error, row.own, row.weights))
            table.add_row(row.format, row.input_format, *figures, runs_on)
    return table


def _model_table(rows: Sequence[ModelRow], reference: float) -> Table:
    table = _table("perplexity", "× float32", "KL", "top 1", "experts")
    for row in rows:
        if row.perplexity is not None:
            table.add_row(
                row.format,
                row.input_format,
                f"{row.perplexity:.4f}",
                f"{row.perplexity / reference:.4f}",
                f"{row.kl:.2e}",
                f"{100 * (row.top_1 or 0):.2f} %",
                bytes_text(row.bytes or 0),
                ", ".join(row.backends),
            )
    return table


def _table(*figures: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("weights")
    table.add_column("activations")
    for name in figures:
        table.add_column(name, justify="right")
    table.add_column("runs on")
    return table

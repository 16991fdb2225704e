"""`moestro tune`: choose runners and tactics for a layer ahead of serving, and keep the decisions in a
store.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moestro.cli import options as opt
from moestro.cli.accuracy import parse_inputs
from moestro.cli.console import ProgressListener, output, progress
from moestro.cli.deliver import every, write_results
from moestro.errors import MoestroError

__all__ = ["tune"]

EXAMPLES = """
[bold]Examples[/]

[cyan]moestro tune --model qwen3-30b-a3b[/]
  NVFP4, for 1 to 1024 tokens, into the user's store

[cyan]moestro tune --model deepseek-v3 --ep 8 --device cuda --tokens 1..16384 --budget 60 --store tuned[/]
  for a minute at most; run it again and it goes on where it stopped

[cyan]moestro tune --model qwen3-30b-a3b --from-misses --store tuned[/]
  at the sizes that serving asked for and the store did not know
"""

BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget", min=0.0, metavar="SECONDS", rich_help_panel=opt.TUNING, help="Of measuring, in all."
    ),
]
SharedLayersOption = Annotated[
    int,
    typer.Option(
        "--layers",
        min=1,
        rich_help_panel=opt.LAYER,
        help="As in bench. Layers of one shape share their decisions, so one is made and tuned.",
    ),
]
InputsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-format",
        metavar="NAME",
        rich_help_panel=opt.LAYER,
        help="Of activations: none, nvfp4, fp8, int8; repeat for several. Default: none.",
    ),
]
MissesOption = Annotated[
    bool,
    typer.Option(
        "--from-misses",
        rich_help_panel=opt.TUNING,
        help="At the sizes of the store's miss log instead of --tokens.",
    ),
]


def tune(
    model: opt.ModelOption = None,
    sizes: opt.SizesOption = None,
    format: opt.FormatOption = None,
    input_format: InputsOption = None,
    backend: opt.BackendOption = None,
    device: opt.DeviceOption = None,
    tokens: opt.TokensOption = "1..1024",
    routing: opt.RoutingsOption = None,
    layers: SharedLayersOption = 1,
    ep: opt.EpOption = 1,
    local_pairs: opt.LocalPairsOption = False,
    seed: opt.SeedOption = 0,
    store: opt.StoreOption = None,
    budget: BudgetOption = None,
    from_misses: MissesOption = False,
    json_file: opt.JsonOption = None,
) -> None:
    """Choose runners and tactics for a layer ahead of serving.

    Every decision is on disk the moment it is made: Ctrl-C loses none, and running again goes on from there.
    Serving finds them through the store: [bold]moestro.autotune(False, cache=DIR)[/].

    Exit status 1 where the store cannot take them: they are shown, but no other process will find them.
    """
    shape = opt.parse_shape(model, sizes, ep, local_pairs)
    chosen_tokens = opt.parse_tokens(tokens)
    from moestro.bench import results
    from moestro.bench import tune as runs

    spec = runs.TuneSpec(
        shape=shape,
        tokens=tuple(chosen_tokens),
        routings=tuple(opt.parse_routing(text) for text in routing or ()),
        formats=tuple(opt.parse_formats(format, ("nvfp4",), shape)),
        inputs=tuple(None if name == "none" else name for name in parse_inputs(input_format, ("none",))),
        backends=tuple(opt.parse_backends(backend)),
        device=opt.parse_device(device),
        seed=seed,
        store=store,
        budget_s=budget,
        from_misses=from_misses,
    )
    with progress() as bar:
        result = runs.run(spec, results.command_line(), ProgressListener(bar))
    from moestro.cli.tables import tune_view

    every(
        lambda: output.print(tune_view(result)),
        lambda: write_results(json_file, result.to_json()),
        lambda: runs.check_kept(result),
    )
    if result.interrupted:
        raise typer.Exit(130)
    if result.skipped and not result.rows and not from_misses:
        raise MoestroError("nothing could be tuned; the reasons are above")

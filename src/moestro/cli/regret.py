"""`moestro bench regret`: how good the tuner's picks are, and whether it picks the same again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moestro.cli import options as opt
from moestro.cli.console import output, progress, seconds_text
from moestro.cli.deliver import every, write_results

if TYPE_CHECKING:
    from moestro.bench.regret import Summary
    from moestro.bench.regret_sim import Outcome, Target

__all__ = ["regret"]

SCHEMA = "moestro.regret/1"
LEGEND = (
    "best: share that picks the fastest (on a device: within two standard errors of the oracle). near: within 1 % of "
    "it, or within those two errors. same: share "
    "of the most frequent pick. flips: share of repeated tunings that disagree. median, 95 %, worst: regret, "
    "the time of the pick over the fastest's, less 1. slower: share slower than the default by more than the "
    "noise floor. samples, time: of one tuning."
)

SimulateOption = Annotated[
    bool,
    typer.Option(
        "--simulate", help="On paper: thousands of tunings under noise, drift and outliers, with targets."
    ),
]
TuningsOption = Annotated[
    int, typer.Option("--tunings", min=10, help="With --simulate: tunings per scenario.")
]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=2, help="Tunings per size, each from scratch.")]
OracleOption = Annotated[
    float, typer.Option("--oracle-seconds", min=0.0, help="How long the oracle measures each size.")
]
SustainedOption = Annotated[
    float | None,
    typer.Option(
        "--sustained",
        min=0.0,
        help="Seconds of load before the oracle and, from 1024 tokens on, before each tuning's race (GPU).",
    ),
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, help="With --simulate; default: one per CPU.")
]


def regret(
    simulate: SimulateOption = False,
    tunings: TuningsOption = 1000,
    processes: ProcessesOption = None,
    model: opt.ModelOption = None,
    sizes: opt.SizesOption = None,
    format: opt.FormatOption = None,
    backend: opt.BackendOption = None,
    device: opt.DeviceOption = None,
    tokens: opt.TokensOption = "1,16,256",
    routing: opt.RoutingOption = "uniform",
    ep: opt.EpOption = 1,
    local_pairs: opt.LocalPairsOption = False,
    seed: opt.SeedOption = 0,
    repeats: RepeatsOption = 6,
    oracle_seconds: OracleOption = 10.0,
    sustained: SustainedOption = None,
    json_file: opt.JsonOption = None,
) -> None:
    """How much slower the picked tactics are than the best, and how often repeated tunings disagree.

    Exit status 1 if a target of --simulate fails, or, on a device, a pick is slower than the default by more
    than the noise floor.
    """
    if simulate:
        held = _simulate(tunings, processes or os.cpu_count() or 1, json_file)
    else:
        from moestro.bench.regret_layers import LayersSpec

        shape = opt.parse_shape(model, sizes, ep, local_pairs)
        spec = LayersSpec(
            shape=shape,
            tokens=tuple(opt.parse_tokens(tokens)),
            routing=opt.parse_routing(routing),
            formats=tuple(opt.parse_formats(format, ("nvfp4",), shape)),
            backends=tuple(opt.parse_backends(backend)),
            device=opt.parse_device(device),
            seed=seed,
            repeats=repeats,
            oracle_seconds=oracle_seconds,
            sustained_s=sustained,
        )
        held = _measure(spec, json_file)
    if not held:
        raise typer.Exit(1)


# --- on paper ---
def _simulate(tunings: int, processes: int, json_file: Path | None) -> bool:
    from moestro.bench import regret_sim

    outcomes = []
    with progress() as bar:
        for scenario in regret_sim.SCENARIOS:
            task = bar.add_task(scenario.name, total=tunings)
            outcomes.append(
                regret_sim.run(scenario, tunings, processes, lambda task=task: bar.advance(task))  # type: ignore[misc]
            )
            bar.remove_task(task)
    for outcome in outcomes:
        output.print(f"\n[bold]{outcome.scenario.name}[/]: {outcome.scenario.about}", highlight=False)
        output.print(_table(outcome.summaries))
        for name, samples in outcome.equal_samples.items():
            needs = f"{samples} samples" if samples else "more samples than were tried"
            output.print(f"equal sampling by the {name} statistic is as often right with {needs}")
        for target, value, held in outcome.targets:
            mark = "[green]holds[/]" if held else "[bold red]FAILS[/]"
            output.print(f"{mark} {_target_text(target)}: {value:.2%}", highlight=False)
    output.print(f"\n{LEGEND}", style="dim")
    _write(json_file, "simulated", [_simulated_json(outcome) for outcome in outcomes], {"tunings": tunings})
    return all(outcome.held for outcome in outcomes)


def _target_text(target: Target) -> str:
    limit = f"at least {target.least:.0%}" if target.least is not None else f"at most {target.most:.0%}"
    return f"{target.what.replace('_', ' ')} {limit}"


def _simulated_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "scenario": dataclasses.asdict(outcome.scenario),
        "schemes": [dataclasses.asdict(summary) for summary in outcome.summaries],
        "equal_sampling_samples": outcome.equal_samples,
        "targets": [
            {**dataclasses.asdict(target), "value": value, "held": held}
            for target, value, held in outcome.targets
        ],
    }


# --- on a device ---
def _measure(spec: Any, json_file: Path | None) -> bool:
    """Whether no pick is slower than the default. What is measured when the run breaks off is shown and written."""
    from moestro.bench import regret_layers

    outcomes: list[Any] = []
    interrupted = False

    def run() -> None:
        nonlocal interrupted
        try:
            with progress() as bar:
                task = bar.add_task("making the layer", total=None)
                for outcome in regret_layers.run(spec, lambda what: bar.update(task, description=what)):
                    outcomes.append(outcome)
        except KeyboardInterrupt:
            interrupted = True

    every(run, lambda: _show(outcomes), lambda: _write_measured(json_file, spec, outcomes))
    if interrupted:
        raise typer.Exit(130)
    return all(outcome.found.moestro.slower_than_default == 0 for outcome in outcomes)


def _show(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        found, oracle = outcome.found, outcome.found.oracle
        output.print(
            f"\n[bold]{outcome.format} {outcome.backend}, {outcome.tokens} tokens[/]: "
            f"{len(oracle.candidates)} tactics, default {seconds_text(oracle.default_seconds)}, "
            f"the best takes {oracle.best:.3f} ± {oracle.error:.3f} of it",
            highlight=False,
        )
        output.print(_table((found.moestro, found.field)))
        if clocks := found.clocks:
            low, high = clocks.get("sm_mhz", (None, None))
            held = ", ".join(clocks.get("throttle") or ()) or "nothing"
            output.print(f"SM clock {low} to {high} MHz, held back by: {held}", style="dim", highlight=False)
    output.print(f"\n{LEGEND}", style="dim")


def _write_measured(json_file: Path | None, spec: Any, outcomes: Sequence[Any]) -> None:
    # shape and routing have a JSON form of their own
    conditions = dataclasses.asdict(dataclasses.replace(spec, shape=None, routing=None))
    conditions |= {"problem": spec.shape.to_json(), "routing": spec.routing.name}
    _write(json_file, spec.device, [dataclasses.asdict(outcome) for outcome in outcomes], conditions)


# --- both ---
def _table(summaries: Sequence[Summary]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns hold it
    table.add_column("scheme", no_wrap=True)
    for name in ("best", "near", "same", "flips", "median", "95 %", "worst", "slower", "samples", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(*_cells(summary))
    return table


def _cells(summary: Summary) -> list[str]:
    return [
        summary.scheme,
        f"{summary.best_picked:.1%}",
        f"{summary.near_best:.1%}",
        f"{summary.same_pick:.1%}",
        f"{summary.flips:.1%}",
        f"{summary.regret_median:.2%}",
        f"{summary.regret_p95:.2%}",
        f"{summary.regret_worst:.2%}",
        f"{summary.slower_than_default:.1%}",
        f"{summary.samples:.0f}",
        seconds_text(summary.seconds),
    ]


def _write(path: Path | None, device: str, rows: list[dict[str, Any]], conditions: dict[str, Any]) -> None:
    from moestro.bench import results

    write_results(
        path,
        {
            "schema": SCHEMA,
            "command": results.command_line(),
            "date": results.now(),
            "environment": results.environment("cpu" if device == "simulated" else device),
            "device": device,
            "conditions": conditions,
            "rows": rows,
        },
    )

"""`moestro bench`: measure Moestro beside what people use today; `parity` repeats whole runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli import accuracy as exact
from moestro.cli import ep as expert_parallel
from moestro.cli import options as opt
from moestro.cli import recall, regret
from moestro.cli.console import ProgressListener, errors, output, progress, quiet
from moestro.cli.deliver import every, keeping, wrote

__all__ = ["app"]

EXAMPLES = """
[bold]Examples[/]

[cyan]moestro bench --model qwen3-30b-a3b[/]
  bf16 and NVFP4 beside Transformers, 1 to 1024 tokens

[cyan]moestro bench --model deepseek-v3 --ep 8 --local-pairs --format nvfp4 --device cuda --tokens 1..16384[/]
  the slice of one of eight ranks on a GPU

[cyan]moestro bench --sizes 64,8,2048,1024 --routing zipf:1.2 --json out.json --report out.html[/]
  a layer of your own, under skewed routing, with results to keep

[cyan]moestro bench --model mixtral-8x7b --routing uniform --routing zipf:1.0 --routing trained[/]
  several routings in one run, and the worst ratio to each peer

[cyan]moestro bench --model qwen3-30b-a3b --device cuda --format mxfp4 --input-format fp8 --peers humming_fp8[/]
  FP8 activations beside a peer that has them; errors against the same arithmetic and the exact product

[cyan]moestro bench --accuracy --sizes 32,4,2048,768 --model-dir DIR[/]
  how exact each format of weights and activations is, on a layer and on a model's next tokens
"""

app = typer.Typer(
    invoke_without_command=True,
    help="Measure Moestro beside Transformers' experts (and GPU peers), in one run, alternating.\n\n"
    "All contenders run the same weights and inputs from cold caches; ratios are against the fastest peer of "
    "the same run. Decisions come from the store that [bold]moestro tune[/] fills.",
    epilog=EXAMPLES,
    rich_markup_mode="rich",
)


ACCURACY_FORMATS = ("bf16", "nvfp4", "mxfp4", "mxfp8", "fp8_block")

PeersOption = Annotated[
    str,
    typer.Option(
        "--peers",
        metavar="LIST",
        help="all, none, or names: eager, batched_mm, grouped_mm (Transformers); on a GPU also humming, "
        "humming_mxfp4, humming_fp8, triton_kernels, triton_kernels_mxfp4, deep_gemm, deep_gemm_products, marlin, "
        "vllm_triton, where installed.",
    ),
]
PeerMemoryOption = Annotated[
    float,
    typer.Option(
        "--peer-memory", min=0.0, metavar="GIB", help="Weights that a peer may copy in one call (batched_mm)."
    ),
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", min=0.0, help="Time per contender and number of tokens.")
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Alternating rounds at least.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        callback=opt.writable,
        rich_help_panel="Output",
        help="Write report.html with plots.",
    ),
]


@app.callback()
def bench(
    ctx: typer.Context,
    model: opt.ModelOption = None,
    sizes: opt.SizesOption = None,
    format: opt.FormatOption = None,
    backend: opt.BackendOption = None,
    device: opt.DeviceOption = None,
    tokens: opt.BenchTokensOption = None,
    routing: opt.BenchRoutingsOption = None,
    layers: opt.LayersOption = 1,
    ep: opt.EpOption = 1,
    local_pairs: opt.LocalPairsOption = False,
    seed: opt.SeedOption = 0,
    peers: PeersOption = "all",
    peer_memory: PeerMemoryOption = 0.5,
    seconds: SecondsOption = 1.0,
    rounds: RoundsOption = 7,
    store: opt.StoreOption = None,
    json_file: opt.JsonOption = None,
    report: ReportOption = None,
    accuracy: exact.AccuracyOption = False,
    model_dir: exact.ModelDirOption = None,
    text: exact.TextOption = None,
    input_format: exact.InputFormatOption = None,
) -> None:
    if ctx.invoked_subcommand is not None:
        return
    routings = [opt.parse_routing(one) for one in routing or ("uniform",)]
    if accuracy:
        layer = model is not None or sizes is not None or model_dir is None
        asked = exact.AccuracySpec(
            shape=opt.parse_shape(model, sizes, ep, local_pairs) if layer else None,
            model_dir=model_dir,
            text=text,
            formats=tuple(opt.parse_formats(format, ACCURACY_FORMATS)),
            inputs=exact.parse_inputs(input_format),
            routing=_the_one("--routing", routings),
            tokens=_the_one("--tokens", [64] if tokens is None else opt.parse_tokens(tokens)),
            backend=_the_one("--backend", opt.parse_backends(backend)),
            device=opt.parse_device(device),
            seed=seed,
        )
        exact.measure(asked, json_file)
        return
    exact.only_with_accuracy({"--model-dir": model_dir, "--text": text})
    shape = opt.parse_shape(model, sizes, ep, local_pairs)
    chosen_tokens = opt.parse_tokens("1..1024" if tokens is None else tokens)
    from moestro.bench import run as runs
    from moestro.bench.measure import Plan

    if report is not None:
        _check_report()
    where = opt.parse_device(device)
    spec = runs.BenchSpec(
        shape=shape,
        tokens=tuple(chosen_tokens),
        routing=routings[0],
        formats=tuple(opt.parse_formats(format, ("bf16", "nvfp4"), shape)),
        inputs=tuple(
            None if name == "none" else name for name in exact.parse_inputs(input_format, ("none",))
        ),
        backends=tuple(opt.parse_backends(backend)),
        peers=_parse_peers(peers, where),
        device=where,
        layers=layers,
        seed=seed,
        store=store,
        peer_memory=round(peer_memory * 2**30),
        plan=Plan(min_rounds=rounds, max_rounds=max(rounds, 101), seconds=seconds),
    )
    _deliver(_run(spec, routings, json_file), json_file, report, store)


def _the_one(option: str, values: list[Any]) -> Any:
    """The only value. A usage error for several: accuracy is measured for one at a time."""
    if len(values) != 1:
        raise typer.BadParameter(f"--accuracy takes one, got {len(values)}", param_hint=option)
    return values[0]


def _run(spec: Any, routings: list[Any], json_file: Path | None) -> Any:
    """The results; what is measured so far is in the file after every case, marked as interrupted."""
    from moestro.bench import results, timing
    from moestro.bench import run as runs

    with progress() as bar, quiet():
        keep = None if json_file is None else keeping(functools.partial(_write, json_file))
        clock, command = timing.timer_for(spec.device), results.command_line()
        return runs.run_each(spec, routings, clock, command, ProgressListener(bar), keep)


def _write(json_file: Path, found: list[Any]) -> None:
    from moestro.bench import results, worst

    if len(found) == 1:
        results.write(found[0], json_file)
    else:
        worst.write(found, json_file)


def _deliver(found: list[Any], json_file: Path | None, report: Path | None, store: Path | None) -> None:
    from moestro.bench import run as runs

    every(
        lambda: _write_and_say(json_file, found),  # first: whatever becomes of the terminal, it is kept
        lambda: _show(found),
        lambda: _say_untuned(found, store),
        lambda: _write_report(report, found, store),
    )
    if any(result.interrupted for result in found):
        raise typer.Exit(130)
    for result in found:
        runs.check_measured(result)


def _show(found: list[Any]) -> None:
    from moestro.bench import worst
    from moestro.cli.tables import bench_view, worst_view

    for result in found:
        output.print(bench_view(result))
    if len(found) > 1 and (rows := worst.worst_ratios(found)):
        output.print(worst_view(rows))


def _say_untuned(found: list[Any], store: Path | None) -> None:
    """Where a store was named and nothing of it served: a slip in its name would else look like a slow kernel."""
    served = [row.facts.get("status") for result in found for row in result.rows if row.ours]
    if store is not None and served and set(served) == {"default"}:
        why = "has no decisions for this layer" if store.is_dir() else "is no folder"
        errors.print(
            f"{store} {why}: default tactics were measured; moestro tune --store {store} chooses others",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _write_and_say(json_file: Path | None, found: list[Any]) -> None:
    if json_file is not None:
        _write(json_file, found)
        wrote("results", json_file)


def _write_report(report: Path | None, found: list[Any], store: Path | None) -> None:
    if report is not None and any(result.rows for result in found):
        from moestro.bench.report import write_report

        write_report(report, found, store)
        wrote("report", report)


def _parse_peers(text: str, device: str) -> tuple[str, ...]:
    from moestro.bench.peers import peer_names
    from moestro.errors import BackendError, unknown_name

    known = peer_names(device)
    if text in ("all", "none"):
        return known if text == "all" else ()
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    with opt.usage("--peers"):
        for name in chosen:
            if name not in known:
                raise BackendError(unknown_name("peer", name, {"all", "none", *known}))
    return chosen


def _check_report() -> None:
    from moestro.bench import plots
    from moestro.errors import MoestroError

    if (reason := plots.why_not()) is not None:
        raise MoestroError(f"report: {reason}")


@app.command(
    "parity",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="[bold]Example[/]\n\n[cyan]moestro bench parity --model deepseek-v3 --device cuda --format nvfp4 "
    "--ep 8 --ep 16 --runs 3 --tokens 1024..16384[/]",
)
def parity(
    ctx: typer.Context,
    runs: Annotated[int, typer.Option("--runs", min=2, help="Whole runs, each a process of its own.")] = 3,
    ep: Annotated[list[int] | None, typer.Option("--ep", min=1, help="Repeat for several.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="PEER", help="A peer's name; default: the fastest of each run."),
    ] = None,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="DIR", help="Keep every run's JSON.")] = None,
    json_file: opt.JsonOption = None,
) -> None:
    """Repeat whole runs and print how far Moestro is from a peer: Δ% per N and EP, mean and spread.

    Every other option is handed to `moestro bench`.
    """
    from moestro.bench import parity as runs_of
    from moestro.cli.tables import parity_view

    eps, done = ep or [1], list[Any]()

    def repeat() -> None:
        with progress() as bar:
            task = bar.add_task("runs", total=runs * len(eps))

            def on_run(ranks: int, run: int) -> None:
                at = run * len(eps) + eps.index(ranks)
                bar.update(task, completed=at, description=f"EP{ranks}, run {run + 1}")

            for one in runs_of.repeat(ctx.args, runs, eps, on_run, keep):
                done.append(one)
                if len(done) == len(eps) and not runs_of.deltas(done, against):
                    raise _nothing_to_compare(against)

    def deliver() -> None:  # of the runs before, if one has failed
        if found := runs_of.deltas(done, against):
            output.print(parity_view(found, done))
            if json_file is not None:
                runs_of.write(json_file, found, done)
                wrote("results", json_file)

    every(repeat, deliver)
    if len(done) < runs * len(eps):
        raise typer.Exit(130)


def _nothing_to_compare(against: str | None) -> Exception:
    from moestro.errors import MoestroError

    wanted = "no peer" if against is None else f"no peer {against!r}"
    return MoestroError(f"parity: {wanted} was measured beside moestro, so there is nothing to compare")


app.command("regret")(regret.regret)
app.command("recall")(recall.recall)
app.command("ep", epilog=expert_parallel.EXAMPLES)(expert_parallel.bench_ep)

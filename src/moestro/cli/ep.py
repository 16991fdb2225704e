"""`moestro bench ep`: expert parallelism on the ranks that torchrun started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli import options as opt
from moestro.cli.console import output, quiet, seconds_text
from moestro.cli.deliver import keeping
from moestro.errors import ModelError

__all__ = ["EXAMPLES", "bench_ep"]

EXAMPLES = """
[bold]Examples[/]

[cyan]torchrun --nproc-per-node 8 -m moestro bench ep --model deepseek-v3 --tokens 64,1024,4096[/]
  eight GPUs of one host; --device cpu does it with gloo on a machine without

[cyan]torchrun --nproc-per-node 2 -m moestro bench ep --model deepseek-v3 --experts 64 --json ep2.json[/]
  two GPUs, each with as many experts as one of eight would hold
"""

ExpertsOption = Annotated[
    int | None,
    typer.Option(
        "--experts", min=1, rich_help_panel=opt.LAYER, help="Another number of experts than the model's."
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(
        "--replicas",
        min=0,
        rich_help_panel=opt.LAYER,
        help="Copies of hot experts; the placement is balanced for the routing's loads. 0: contiguous shards.",
    ),
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=3, help="Samples of each contender.")]
BudgetOption = Annotated[
    float, typer.Option("--budget", min=0.0, metavar="SECONDS", help="Of tuning the local experts before.")
]


def bench_ep(
    model: opt.ModelOption = None,
    sizes: opt.SizesOption = None,
    experts: ExpertsOption = None,
    format: opt.FormatOption = None,
    device: opt.DeviceOption = None,
    tokens: opt.TokensOption = "64,1024,4096",
    routing: opt.RoutingOption = "uniform",
    replicas: ReplicasOption = 0,
    rounds: RoundsOption = 15,
    budget: BudgetOption = 0.0,
    seed: opt.SeedOption = 0,
    store: opt.StoreOption = None,
    json_file: opt.JsonOption = None,
) -> None:
    """Measure expert parallelism: ways, stages, imbalance, beside one rank and plain PyTorch. Under torchrun."""
    shape = opt.parse_shape(model, sizes)
    shape = dataclasses.replace(shape, num_experts=experts) if experts is not None else shape
    chosen_tokens, formats = opt.parse_tokens(tokens), opt.parse_formats(format, ("nvfp4",), shape)
    distribution = opt.parse_routing(routing)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise typer.BadParameter(
            "needs one process a rank: start it with `torchrun --nproc-per-node RANKS -m moestro bench ep ...`"
        )
    size = int(os.environ["WORLD_SIZE"])
    if shape.num_experts < size:
        raise ModelError(f"experts: {shape.num_experts} cannot be on {size} ranks")
    kind = opt.parse_device(device)
    from moestro.bench import ep

    spec = ep.EpSpec(
        shape=shape,
        tokens=tuple(chosen_tokens),
        routing=distribution,
        format=formats[0],
        seed=seed,
        rounds=rounds,
        placement=_placement(distribution, shape, size, replicas, seed) if replicas else None,
        store=store,
        budget_s=budget,
    )
    with _group(kind) as (group, where), quiet():
        _run(dataclasses.replace(spec, device=where), group, json_file)


def _placement(routing: Any, shape: Any, size: int, replicas: int, seed: int) -> Any:
    """Balanced for the loads of a sample of the routing."""
    from moestro.parallel import place

    ids = routing.sample(8192, shape.num_experts, shape.top_k, seed)
    return place(ids.flatten().bincount(minlength=shape.num_experts), size, replicas)


def _run(spec: Any, group: Any, json_file: Path | None) -> None:
    """Measure; rank 0 shows each row, and writes all so far, so that nothing that goes wrong later loses them."""
    from moestro.bench import ep, results

    first = group.rank() == 0
    rows: list[Any] = []
    if first:
        title = f"{spec.shape.describe()} on {group.size()} ranks, {spec.format}, {spec.routing.name} routing"
        output.print(title, highlight=False)

    def write() -> None:
        if json_file is not None:
            results.write_json(json_file, ep.to_json(spec, rows, group.size(), results.command_line()))

    keep = keeping(write)  # an error here would leave the other ranks waiting

    def on_row(row: Any) -> None:
        rows.append(row)
        if first:
            output.print(_line(row), highlight=False)
            keep()

    ep.run(spec, group, on_row)
    if first:  # again: what could not be written on the way is an error now
        write()


def _line(row: Any) -> str:
    stages = " + ".join(f"{name} {seconds_text(seconds)}" for name, seconds in row.stages.items())
    parts = [
        f"N={row.tokens:<6}{row.contender:<13}{seconds_text(row.seconds):>8}  {row.tokens_per_s:12,.0f} tokens/s"
    ]
    if row.efficiency is not None:
        parts.append(f"efficiency {row.efficiency:.2f}, imbalance {row.imbalance:.2f}")
    return "  ".join([*parts, *([f"[dim]{stages}[/]"] if stages else [])])


@contextmanager
def _group(kind: str) -> Iterator[tuple[Any, str]]:
    """(the group of torchrun's ranks, this rank's device)."""
    import torch
    import torch.distributed as dist

    where = "cpu"
    if kind.startswith("cuda"):
        where = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(where)
    how = {"device_id": torch.device(where)} if where != "cpu" else {}
    dist.init_process_group("gloo" if where == "cpu" else "nccl", **how)  # type: ignore[arg-type]
    try:
        yield dist.group.WORLD, where
    finally:
        dist.destroy_process_group()

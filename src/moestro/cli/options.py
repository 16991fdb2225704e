"""Options that commands share, and their texts turned into values.

Every text is checked before any work: what is wrong is a usage error (exit status 2) that names the option
and, for names, the nearest known ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.bench.models import MoeShape, find, from_sizes
from moestro.errors import MoestroError

if TYPE_CHECKING:
    from moestro.routing import Distribution

__all__ = [
    "BackendOption",
    "DeviceOption",
    "EpOption",
    "FormatOption",
    "JsonOption",
    "LayersOption",
    "LocalPairsOption",
    "ModelOption",
    "RoutingOption",
    "RoutingsOption",
    "SeedOption",
    "SizesOption",
    "StoreOption",
    "TokensOption",
    "parse_backends",
    "parse_device",
    "parse_formats",
    "parse_routing",
    "parse_shape",
    "parse_tokens",
    "usage",
    "writable",
]

LAYER, TUNING, OUTPUT = "The layer", "Tuning", "Output"


def writable(path: Path | None) -> Path | None:
    """A file to be written, checked before any work (a callback of options). A usage error if that cannot be."""
    if path is not None and (why := _why_unwritable(path)) is not None:
        raise typer.BadParameter(f"cannot write {path}: {why}")
    return path


def _why_unwritable(path: Path) -> str | None:
    if str(path) == "-":
        return "the terminal has the tables; give a file"
    if path.is_dir():
        return "it is a folder"
    if os.path.exists(path) and not path.is_file():  # a device, a pipe: written as it is
        return None if os.access(path, os.W_OK) else "no permission"
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        return f"{above} is no folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"no permission to write in {above}"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        rich_help_panel=LAYER,
        help="A model's MoE layer: qwen3-30b-a3b, deepseek-v3, mixtral-8x7b, gpt-oss-20b, … "
        "(an unknown name lists all).",
    ),
]
SizesOption = Annotated[
    str | None,
    typer.Option(
        "--sizes",
        metavar="E,K,H,I",
        rich_help_panel=LAYER,
        help="Instead of --model: experts, top_k, hidden size, intermediate size.",
    ),
]
LayersOption = Annotated[
    int,
    typer.Option(
        "--layers",
        min=1,
        rich_help_panel=LAYER,
        help="Layers with weights of their own, taken in turn, as a model would; times are per layer.",
    ),
]
EpOption = Annotated[
    int,
    typer.Option(
        "--ep", min=1, rich_help_panel=LAYER, help="Expert parallelism: the slice of one of this many ranks."
    ),
]
LocalPairsOption = Annotated[
    bool,
    typer.Option(
        "--local-pairs",
        rich_help_panel=LAYER,
        help="With --ep: all N·K pairs fall on this rank's experts (as after a dispatch), not 1/EP of them.",
    ),
]
FormatOption = Annotated[
    list[str] | None,
    typer.Option(
        "--format", "-f", metavar="NAME", rich_help_panel=LAYER, help="Weight format; repeat for several."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", "-d", metavar="cpu|cuda", rich_help_panel=LAYER, help="Default: cuda if there is one."
    ),
]
BackendOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        rich_help_panel=LAYER,
        help="auto (the best that runs here), portable, cpu, triton, or all; repeat for several.",
    ),
]
TokensOption = Annotated[
    str,
    typer.Option(
        "--tokens",
        "-n",
        metavar="LIST",
        rich_help_panel=LAYER,
        help="Numbers of tokens: 1,16,64, or 1..1024 for the powers of two between.",
    ),
]
RoutingOption = Annotated[
    str,
    typer.Option(
        "--routing",
        "-r",
        metavar="NAME[:ARG]",
        rich_help_panel=LAYER,
        help="Where tokens go: uniform, balanced, zipf:1.0, dirichlet:0.5, correlated:0.5, trained, recorded:FILE.",
    ),
]
BenchRoutingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--routing",
        "-r",
        metavar="NAME[:ARG]",
        rich_help_panel=LAYER,
        help="Where tokens go: uniform, balanced, zipf:1.0, dirichlet:0.5, correlated:0.5, trained, recorded:FILE; "
        "repeat for several and the worst ratio to each peer. Default: uniform.",
    ),
]
BenchTokensOption = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        "-n",
        metavar="LIST",
        rich_help_panel=LAYER,
        help="Numbers of tokens: 1,16,64, or 1..1024 for the powers of two between. Default: 1..1024; with "
        "--accuracy one, 64.",
    ),
]
RoutingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--routing",
        "-r",
        metavar="NAME[:ARG]",
        rich_help_panel=LAYER,
        help="Probe: where tokens go while measuring, as in bench; repeat for several (the worst counts). "
        "Default: uniform, zipf:1.0 and trained.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, rich_help_panel=LAYER, help="Of weights and inputs.")
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        file_okay=False,
        rich_help_panel=TUNING,
        help="Store of decisions; default: the user's.",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", callback=writable, rich_help_panel=OUTPUT, help="Write results as JSON."
    ),
]


@contextlib.contextmanager
def usage(option: str) -> Iterator[None]:
    """An error of ours inside becomes a usage error of `option`."""
    try:
        yield
    except MoestroError as error:
        text = str(error)
        raise typer.BadParameter(text, param_hint=option) from error


def parse_shape(model: str | None, sizes: str | None, ep: int = 1, local_pairs: bool = False) -> MoeShape:
    """The layer that --model or --sizes, --ep and --local-pairs ask for."""
    if (model is None) == (sizes is None):
        both = "both" if model else "neither"
        raise typer.BadParameter(
            f"give a model's name or explicit sizes E,K,H,I; got {both}", param_hint="--model / --sizes"
        )
    with usage("--sizes" if model is None else "--model"):
        shape = find(model) if model is not None else from_sizes(sizes or "")
    if local_pairs and ep == 1:
        raise typer.BadParameter(
            "means nothing without --ep: all pairs are local", param_hint="--local-pairs"
        )
    with usage("--ep"):
        return shape.on_ranks(ep, local_pairs)


def parse_tokens(text: str) -> list[int]:
    """ "1,16,64" or "1..1024" (powers of two between, ends included), or both: ascending, each once."""
    found: set[int] = set()
    for part in text.split(","):
        low, dots, high = part.strip().partition("..")
        if (
            not low.isdecimal()
            or (dots and not high.isdecimal())
            or int(low) < 1
            or (dots and int(high) < int(low))
        ):
            raise typer.BadParameter(
                f"expected positive integers like 1,16,64 or a range like 1..1024, got {text!r}",
                param_hint="--tokens",
            )
        found |= {int(low), int(high)} if dots else {int(low)}
        found |= {1 << k for k in range(64) if int(low) <= 1 << k <= int(high)} if dots else set()
    return sorted(found)


def parse_formats(
    names: list[str] | None, default: tuple[str, ...], shape: MoeShape | None = None
) -> list[str]:
    """Known format names, each once, in the order given; those that a layer's sizes can be blocked for."""
    from moestro import formats

    chosen = list(dict.fromkeys(names or default))
    with usage("--format"):
        for name in chosen:
            formats.get(name)
    if shape is not None:
        for name in chosen:
            _check_blocks(name, shape)
    return chosen


def _check_blocks(format: str, shape: MoeShape) -> None:
    """A usage error where a row of the weights is not whole blocks of a format."""
    import torch

    from moestro import formats

    for letter, columns in (("H", shape.hidden_size), ("I", shape.intermediate_size)):
        try:
            formats.get(format).quantize(torch.zeros(1, 1, columns))
        except MoestroError as error:
            raise typer.BadParameter(
                f"{letter} = {columns} of {shape.name} cannot be {format}: {error}",
                param_hint="--sizes / --format",
            ) from error


def parse_backends(names: list[str] | None) -> list[str]:
    """Known backend names, each once; "all" is every one that there is."""
    from moestro.errors import BackendError, unknown_name
    from moestro.kernels.backends import BACKENDS

    chosen = list(dict.fromkeys(names or ("auto",)))
    with usage("--backend"):
        for name in chosen:
            if name not in {"auto", "all", *BACKENDS}:
                raise BackendError(unknown_name("backend", name, {"auto", "all", *BACKENDS}))
    return list(BACKENDS) if "all" in chosen else chosen


def parse_routing(text: str) -> Distribution:
    """The distribution that a text names."""
    from moestro import routing

    with usage("--routing"):
        return routing.parse(text)


def parse_device(text: str | None) -> str:
    """A device that this machine has; without a text, cuda if there is one, else cpu."""
    import torch

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(text)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"expected cpu, cuda or cuda:INDEX, got {text!r}", param_hint="--device"
        ) from error
    if kind.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {text!r}", param_hint="--device")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"got {text!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices "
            "here; `moestro doctor` says why",
            param_hint="--device",
        )
    return text

"""`moestro record`: which experts the tokens of a text go to, into a file that tuning and replay read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.console import errors, output
from moestro.cli.options import usage, writable

__all__ = ["record"]


def record(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The folder of a checkpoint, with its tokenizer.")
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="What to run.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", callback=writable, help="A .safetensors, .pt or .npy file."
        ),
    ] = Path("routing.safetensors"),
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens a call.")] = 512,
    calls: Annotated[int, typer.Option("--calls", min=1, help="At most so many calls.")] = 64,
) -> None:
    """Run a text through a model and record the experts of every token and layer: [sequence, layers, K]."""
    import torch

    from moestro import load, routing
    from moestro.integrations import need_transformers
    from moestro.routing import recorded

    with usage("--out"):
        recorded.check_suffix(out)
    transformers = need_transformers()
    from moestro.integrations.transformers.calibrate import text_batches

    if not text.is_file():
        raise typer.BadParameter(f"must be a file, got {text}", param_hint="--text")
    ready = load(model, report=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    interrupted = False
    try:
        with routing.record(ready) as recording, torch.no_grad():
            for batch in text_batches(tokenizer, text.read_text(), length, calls):
                ready(batch.to(ready.device))
    except KeyboardInterrupt:  # the calls before it are whole
        interrupted = True
        if not len(recording.ids):
            raise
    recording.save(out)
    ids = recording.ids
    output.print(f"{out}: {list(ids.shape)} is [sequence, layers, K], experts 0 to {int(ids.max())}")
    if interrupted:
        errors.print("interrupted; the file holds the calls before")
        raise typer.Exit(130)

"""`moestro convert`: a checkpoint's experts in another format; resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli.console import errors, output, progress
from moestro.machine import bytes_text

__all__ = ["EXAMPLES", "convert"]

EXAMPLES = (
    "moestro convert Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4\n\n"
    "moestro convert SRC DST --format nvfp4 --layout compressed-tensors --text sample.txt\n\n"
    "A run that was killed goes on where it stopped when it is started again."
)


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The folder of a checkpoint.")],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Where to write; empty, or a run to go on with.")
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", help="nvfp4, mxfp4, mxfp8, fp8_block or int4.")
    ] = "nvfp4",
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", help="modelopt, compressed-tensors or deepseek; by default the format's usual one."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Calibrate input scales (for W4A4) on this text."),
    ] = None,
) -> None:
    """Quantise the experts of a checkpoint, shard by shard; everything else stays as it is."""
    from moestro import checkpoints

    seen = _calibration(src, text) if text is not None else None
    with progress() as bar:
        task = bar.add_task("converting", total=None)

        def step(name: str, done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, description=name)

        try:
            checkpoints.convert(src, dst, format, layout, calibration=seen, tensors=step)
        except KeyboardInterrupt:
            errors.print(f"interrupted; whole shards are in {dst}, and the same command goes on from there")
            raise typer.Exit(130) from None
    found = checkpoints.inspect(dst)
    output.print(
        f"{dst}: {len(found.layers)} layers of experts as {found.scheme}, "
        f"{bytes_text(found.expert_bytes)}, other tensors {bytes_text(found.other_bytes)}"
    )


def _calibration(src: Path, text: Path) -> Any:
    from moestro.integrations import need_transformers

    transformers = need_transformers()
    from moestro.integrations.transformers.calibrate import calibrate, text_batches

    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(src)
    return calibrate(model, text_batches(tokenizer, text.read_text()))

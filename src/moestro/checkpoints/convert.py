"""Checkpoints in another format: the experts quantised anew, everything else as it is; shard by shard.

A shard of the source gives one of the result, with what its tensors become: written tensor by tensor to a temporary
file (stream.py), by as many threads as torch has, synced, then renamed. A run that was killed leaves whole shards and
its plan (PLAN) behind; the next one with the same plan writes the missing ones, and the result is what an unbroken run
gives, byte for byte. Gate and up of an expert get one global scale, the larger: engines that read only gate's (vLLM)
are right then, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import INDEX, Safetensors
from moestro.checkpoints.finding import expert_prefixes, quantised_modules
from moestro.checkpoints.requantise import Calibration, Source, Step, steps
from moestro.checkpoints.stream import TensorFile
from moestro.checkpoints.writers import Writer, config_for, writer_for
from moestro.errors import FileError, FormatError
from moestro.workers import lone_workers

PLAN = ".moestro-convert.json"
Progress = Callable[[str, int, int], None]  # (what is done, of how many)


@dataclass(frozen=True)
class _Listener:
    shards: Progress | None
    tensors: Progress | None


def convert(
    src: str | Path,
    dst: str | Path,
    format: str = "nvfp4",
    layout: str | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    tensors: Progress | None = None,
) -> Path:
    """Write the checkpoint folder `src` to `dst` with its experts in `format` (moestro.formats, but "bf16").

    layout: "modelopt", "compressed-tensors", "deepseek" (fp8_block). Modules beside the experts that the source has
    quantised are dequantised. calibration: the largest inputs that experts have seen, for input scales (W4A4).
    progress: called after each shard as (file, shards done, of); tensors: after each tensor of the source, likewise.
    Returns dst. In memory are a few tensors for each thread, of which there are torch.get_num_threads().

    Raises FormatError for a source that is not whole or not known, a combination that there is not, or a `dst` that
    holds something else; FileError where dst cannot be written, or has no room for a shard.
    """
    src, dst = Path(src), Path(dst)
    writer = writer_for(layout, format)
    if not src.is_dir():
        raise FormatError(f"src must be a folder of a checkpoint, got {src}")
    if src.resolve() == dst.resolve():
        raise FormatError(f"dst must be another folder than src, got {dst}")
    source = _source(src, writer, calibration or {})
    _begin(src, dst, writer, calibration)
    _write_shards(source, dst, _Listener(progress, tensors))
    _write_configs(source, src, dst)
    (dst / PLAN).unlink()
    return dst


def _source(src: Path, writer: Writer, calibration: Calibration) -> Source:
    tensors = Safetensors(src)
    prefixes = expert_prefixes(tensors)
    if not prefixes:
        raise FormatError(f"{src} has no experts (tensors named ...experts.0.gate_proj.weight, ...)")
    if unknown := sorted(set(calibration) - set(prefixes)):
        raise FormatError(
            f"calibration must be of experts in {src}, got {unknown[0]}; there are {prefixes[:3]}"
        )
    experts = {prefix: Experts(tensors, prefix) for prefix in prefixes}
    others = quantised_modules(tensors, prefixes)
    biases = {prefix: one.biases() for prefix, one in experts.items()}
    _check_calibration(calibration)
    return Source(tensors, experts, biases, others, writer, calibration, _dtype(src))


def _check_calibration(calibration: Calibration) -> None:
    """FormatError for magnitudes that no scale can be made of."""
    for prefix, parts in calibration.items():
        for part, amax in parts.items():
            if not bool(torch.isfinite(amax).all()):
                at = int((~torch.isfinite(amax)).nonzero()[0])
                raise FormatError(
                    f"what calibration saw in {prefix} must be finite, got {float(amax[at])} for {part} of expert {at}"
                )
            if not bool((amax > 0).any()):
                raise FormatError(
                    f"calibration must reach an expert of {prefix}, got 0 for {part} of all {len(amax)}"
                )


def _begin(src: Path, dst: Path, writer: Writer, calibration: Calibration | None) -> None:
    """Make dst and its plan; go on with one that is the same."""
    files = {file.name: file.stat().st_size for file in sorted(src.glob("*.safetensors"))}
    plan = {
        "format": writer.format,
        "layout": writer.layout,
        "calibrated": _digest(calibration) if calibration else False,
        "files": files,
    }
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"dst {dst} cannot be made: {error}") from error
    if (dst / PLAN).is_file():
        try:
            found = json.loads((dst / PLAN).read_text())
        except ValueError:
            found = None
        if found != plan:
            raise FormatError(f"dst {dst} holds another conversion ({PLAN}: {found}), and this one is {plan}")
    elif any(dst.iterdir()):
        raise FormatError(f"dst must be an empty folder, or one with a conversion to go on with, got {dst}")
    for left in dst.glob("*.partial"):
        left.unlink()
    _write(dst / PLAN, json.dumps(plan).encode())


def _digest(calibration: Calibration) -> str:
    """What tells one calibration from another: shards of two must not meet in one result."""
    digest = hashlib.sha256()
    for prefix in sorted(calibration):
        for part, amax in sorted(calibration[prefix].items()):
            digest.update(f"{prefix} {part}".encode() + amax.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- shards ----------------------------------------------------------------------------------------------
def _write_shards(source: Source, dst: Path, listener: _Listener) -> None:
    files = sorted({source.tensors.file_of(name) for name in source.tensors})
    for i, file in enumerate(files, 1):
        target = dst / file.name
        if not target.exists():
            partial = target.with_suffix(".partial")
            _write_shard(source, list(steps(source, file)), partial, listener)
            _publish(partial, target)
        if listener.shards is not None:
            listener.shards(file.name, i, len(files))


def _write_shard(source: Source, todo: list[Step], partial: Path, listener: _Listener) -> None:
    """Every step's tensors into the file. Each thread runs torch's operations alone: a step's are small."""
    done, rest = 0, iter(todo)
    layout = {name: shape for step in todo for name, shape in step.makes.items()}
    with TensorFile(partial, layout) as file, lone_workers("convert") as pool:
        running = {
            pool.submit(_run, source, step, file) for step in islice(rest, 2 * torch.get_num_threads())
        }
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                done += 1
                if listener.tensors is not None:
                    listener.tensors(partial.stem, done, len(todo))
            running |= {pool.submit(_run, source, step, file) for step in islice(rest, len(ended))}


def _run(source: Source, step: Step, file: TensorFile) -> None:
    for name, tensor in step.run():
        file.write(name, tensor)
    source.tensors.done_with(source.tensors[name] for name in step.reads)


# --- files -----------------------------------------------------------------------------------------------
def _write_configs(source: Source, src: Path, dst: Path) -> None:
    written = Safetensors(sorted(dst.glob("*.safetensors")))
    sizes = {name: written.info(name) for name in written}
    total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in sizes.values())
    where = {name: written.file_of(name).name for name in sorted(written)}
    if set(where.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write(dst / INDEX, json.dumps(index, indent=2).encode())
    experts = tuple(f"{prefix}." for prefix in source.experts)
    plain = [n for n, (_, shape) in sizes.items() if n.endswith(".weight") and len(shape) == 2]
    excluded = sorted(n.removesuffix(".weight") for n in plain if not n.startswith(experts))
    raw = config_for(source.writer, excluded, activations=bool(source.calibration))
    for file in sorted(src.iterdir()):
        skipped = file.suffix in (".safetensors", ".bin", ".pt") or file.name in (
            INDEX,
            "hf_quant_config.json",
        )
        if file.is_file() and not skipped and file.name != "config.json":
            shutil.copyfile(file, dst / file.name)
    config = json.loads((src / "config.json").read_text()) if (src / "config.json").is_file() else {}
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization_config", None)
    _write(dst / "config.json", json.dumps({**config, "quantization_config": raw}, indent=2).encode())
    if raw is not None and raw["quant_method"] == "modelopt":
        inner = {name: value for name, value in raw.items() if name != "quant_method"}
        beside = {"producer": {"name": "moestro"}, "quantization": inner}
        _write(dst / "hf_quant_config.json", json.dumps(beside, indent=2).encode())


def _dtype(src: Path) -> torch.dtype:
    """What the model computes in, as its config says."""
    config = json.loads((src / "config.json").read_text()) if (src / "config.json").is_file() else {}
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name), torch.bfloat16)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}") from error
    _publish(partial, path)


def _publish(partial: Path, target: Path) -> None:
    """On the disk as a whole, or not at all."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)

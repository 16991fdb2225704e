"""Checkpoints in another format: the experts quantised anew, everything else as it is; shard by shard.

A shard of the source gives one of the result, with what its tensors become: written to a temporary file, synced,
then renamed. A run that was killed leaves whole shards and its plan (PLAN) behind; the next one with the same plan
writes the missing ones, and the result is what an unbroken run gives, byte for byte. Gate and up of an expert get
one global scale, the larger: engines that read only gate's (vLLM) are right then, too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro import formats
from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import INDEX, Safetensors
from moestro.checkpoints.finding import expert_prefixes, quantised_modules
from moestro.checkpoints.layouts import Layout
from moestro.checkpoints.writers import Writer, config_for, writer_for
from moestro.errors import FormatError
from moestro.formats import NVFP4
from moestro.formats.nvfp4 import dynamic_global_scale
from moestro.formats.pieces import magnitude

PLAN = ".moestro-convert.json"
Progress = Callable[[str, int, int], None]  # (what is done, of how many)
# prefix -> {"gate_up": amax of x [E], "down": amax of the intermediate [E]}: what calibration has seen
Calibration = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Job:
    tensors: Safetensors
    experts: dict[str, Experts]
    biases: dict[str, dict[str, torch.Tensor]]  # by prefix
    others: dict[str, tuple[Layout, dict[str, str]]]
    writer: Writer
    calibration: Calibration
    dtype: torch.dtype


def convert(
    src: str | Path,
    dst: str | Path,
    format: str = "nvfp4",
    layout: str | None = None,
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint folder `src` to `dst` with its experts in `format` (moestro.formats, but "bf16").

    layout: "modelopt", "compressed-tensors", "deepseek" (fp8_block). Modules beside the experts that the source has
    quantised are dequantised. calibration: the largest inputs that experts have seen, for input scales (W4A4).
    progress: called after each shard. Returns dst. At most one shard is in memory.

    Raises FormatError for a source that is not whole or not known, a combination that there is not, or a `dst` that
    holds something else.
    """
    src, dst = Path(src), Path(dst)
    writer = writer_for(layout, format)
    if not src.is_dir():
        raise FormatError(f"src must be a folder of a checkpoint, got {src}")
    if src.resolve() == dst.resolve():
        raise FormatError(f"dst must be another folder than src, got {dst}")
    tensors = Safetensors(src)
    prefixes = expert_prefixes(tensors)
    if not prefixes:
        raise FormatError(f"{src} has no experts (tensors named ...experts.0.gate_proj.weight, ...)")
    experts = {prefix: Experts(tensors, prefix) for prefix in prefixes}
    others = quantised_modules(tensors, prefixes)
    biases = {prefix: one.biases() for prefix, one in experts.items()}
    job = _Job(tensors, experts, biases, others, writer, calibration or {}, _dtype(src))
    _begin(src, dst, writer, bool(calibration))
    _write_shards(job, dst, progress)
    _write_configs(job, src, dst)
    (dst / PLAN).unlink()
    return dst


def _begin(src: Path, dst: Path, writer: Writer, calibrated: bool) -> None:
    """Make dst and its plan; go on with one that is the same."""
    files = {file.name: file.stat().st_size for file in sorted(src.glob("*.safetensors"))}
    plan = {"format": writer.format, "layout": writer.layout, "calibrated": calibrated, "files": files}
    dst.mkdir(parents=True, exist_ok=True)
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


def _write_shards(job: _Job, dst: Path, progress: Progress | None) -> None:
    from safetensors.torch import save_file

    files = sorted({job.tensors.file_of(name) for name in job.tensors})
    for i, file in enumerate(files, 1):
        target = dst / file.name
        if not target.exists():
            partial = target.with_suffix(".partial")
            save_file(dict(_shard(job, file)), partial, metadata={"format": "pt"})
            _publish(partial, target)
        if progress is not None:
            progress(file.name, i, len(files))


def _shard(job: _Job, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What the tensors of a source file become."""
    mine = [name for name in job.tensors if job.tensors.file_of(name) == file]
    owners = {name: prefix for prefix in job.experts for name in job.tensors.under(prefix)}
    consumed = {tensor: module for module, (_, pieces) in job.others.items() for tensor in pieces.values()}
    main = {
        experts.main_tensor(e, projection): (prefix, e, projection)
        for prefix, experts in job.experts.items()
        for projection in experts.projections
        for e in (range(1) if experts.stacked else range(len(experts)))
    }
    for name in mine:
        if name in main:
            yield from _expert(job, *main[name])
        elif name in owners:
            continue  # a scale or bias, which goes with its weight
        elif name in consumed:
            yield from _dequantised(job, consumed[name], name)
        else:
            yield name, job.tensors[name]


def _dequantised(job: _Job, module: str, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    row, pieces = job.others[module]
    if name == pieces.get("bias"):
        yield name, job.tensors[name]
    elif name == pieces[next(iter(row.pieces))]:
        weight = row.read(module, {suffix: job.tensors[pieces[suffix]] for suffix in row.pieces})
        dense = weight.dequantize(torch.float32)
        if "pre_quant_scale" in pieces:
            dense = dense * job.tensors[pieces["pre_quant_scale"]].float()
        yield f"{module}.weight", dense.to(job.dtype)


# --- experts ---------------------------------------------------------------------------------------------
def _expert(job: _Job, prefix: str, expert: int, projection: str) -> Iterator[tuple[str, torch.Tensor]]:
    """One projection of an expert (of all experts, where they are stacked) in the new format."""
    experts = job.experts[prefix]
    biases = job.biases[prefix]
    for e in range(len(experts)) if experts.stacked else (expert,):
        dense = experts.dense(e, projection)
        parts = dense.chunk(2) if projection == "gate_up_proj" else [dense]
        names = _names(projection, len(parts))
        scale = _shared_scale(experts, e, projection) if job.writer.format == "nvfp4" else None
        for i, (name, part) in enumerate(zip(names, parts, strict=True)):
            where = f"{prefix}.{e}.{name}"
            for suffix, piece in job.writer.pieces(_quantised(job, part, scale)).items():
                yield f"{where}.{suffix}", piece.contiguous()
            yield from _calibrated(job, prefix, e, name, where)
            yield from _bias(experts, biases, e, projection, where, i, len(parts))


def _names(projection: str, parts: int) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if parts == 2 else (projection,)


def _quantised(job: _Job, dense: torch.Tensor, scale: torch.Tensor | None) -> Any:
    if scale is not None:
        return NVFP4.quantize(dense, scale)
    return formats.get(job.writer.format).quantize(dense)


def _shared_scale(experts: Experts, e: int, projection: str) -> torch.Tensor:
    """The global scale of a projection: the same for gate and up."""
    ups = experts.projections[:-1]
    names = ups if projection in ups else (projection,)
    return dynamic_global_scale(torch.stack([magnitude(experts.dense(e, n), (-2, -1)) for n in names]).amax())


def _calibrated(job: _Job, prefix: str, e: int, name: str, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    seen = job.calibration.get(prefix)
    if seen is None:
        return
    amax = seen["down" if name in ("down_proj", "w2") else "gate_up"]
    # An expert that no token went to takes the largest of the others.
    value = amax[e] if float(amax[e]) > 0 else amax.amax()
    yield from (
        (f"{where}.{s}", v) for s, v in job.writer.input_scale(dynamic_global_scale(value.float())).items()
    )


def _bias(
    experts: Experts, biases: dict[str, torch.Tensor], e: int, projection: str, where: str, i: int, parts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    *ups, down = experts.projections
    bias = biases.get("down_bias" if projection == down else "gate_up_bias")
    if bias is None:
        return
    row = bias[e]
    if projection != down:
        count = parts if parts == 2 else len(ups)
        row = row.chunk(count)[i if parts == 2 else ups.index(projection)]
    yield f"{where}.bias", row.contiguous().clone()


# --- files -----------------------------------------------------------------------------------------------
def _write_configs(job: _Job, src: Path, dst: Path) -> None:
    written = Safetensors(sorted(dst.glob("*.safetensors")))
    sizes = {name: written.info(name) for name in written}
    total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in sizes.values())
    where = {name: written.file_of(name).name for name in sorted(written)}
    if set(where.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write(dst / INDEX, json.dumps(index, indent=2).encode())
    experts = tuple(f"{prefix}." for prefix in job.experts)
    plain = [n for n, (_, shape) in sizes.items() if n.endswith(".weight") and len(shape) == 2]
    excluded = sorted(n.removesuffix(".weight") for n in plain if not n.startswith(experts))
    raw = config_for(job.writer, excluded, activations=bool(job.calibration))
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
    partial.write_bytes(content)
    _publish(partial, path)


def _publish(partial: Path, target: Path) -> None:
    """On the disk as a whole, or not at all."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)

"""What a source file's tensors become in another format: a list of small steps, each with what it makes.

A step knows the names, dtypes and shapes of its tensors before it runs, so that a file can have a place for each;
running it reads, quantises and gives them. Steps stand alone: they may run in any order, and in several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moestro import formats
from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import Safetensors
from moestro.checkpoints.layouts import Layout
from moestro.checkpoints.stream import Shape
from moestro.checkpoints.writers import Writer
from moestro.errors import FormatError
from moestro.formats import INT4, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.formats.fp8_block import BLOCK
from moestro.formats.nvfp4 import dynamic_global_scale
from moestro.formats.pieces import magnitude

# prefix -> {"gate_up": amax of x [E], "down": amax of the intermediate [E]}: what calibration has seen
Calibration = dict[str, dict[str, torch.Tensor]]
Made = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Step:
    """makes: its tensors. run: gives them. reads: the source's tensors, whose pages are let go afterwards."""

    makes: dict[str, Shape]
    run: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint that is converted. amax: of gate's and up's values, which two steps need (one global scale)."""

    tensors: Safetensors
    experts: dict[str, Experts]
    biases: dict[str, dict[str, torch.Tensor]]  # by prefix
    others: dict[str, tuple[Layout, dict[str, str]]]
    writer: Writer
    calibration: Calibration
    dtype: torch.dtype
    amax: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def steps(source: Source, file: Path) -> Iterator[Step]:
    """The steps for the tensors of one source file."""
    tensors = source.tensors
    owners = {name for prefix in source.experts for name in tensors.under(prefix)}
    consumed = {t: module for module, (_, pieces) in source.others.items() for t in pieces.values()}
    main = {
        experts.main_tensor(e, projection): (prefix, e, projection)
        for prefix, experts in source.experts.items()
        for projection in experts.projections
        for e in (range(1) if experts.stacked else range(len(experts)))
    }
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for name in tensors:
        if tensors.file_of(name) != file:
            continue
        if name in main:
            yield from _expert_steps(source, *main[name], name, shapes)
        elif name in owners:
            continue  # a scale or bias, which goes with its weight
        elif name in consumed:
            yield from _dequantising(source, consumed[name], name)
        else:
            yield Step({name: tensors.info(name)}, lambda n=name: [(n, tensors[n])], (name,))  # type: ignore[misc]


def _dequantising(source: Source, module: str, name: str) -> Iterator[Step]:
    row, pieces = source.others[module]
    if name == pieces.get("bias"):
        yield Step({name: source.tensors.info(name)}, lambda: [(name, source.tensors[name])], (name,))
    elif name == pieces[next(iter(row.pieces))]:

        def stored() -> Any:
            return row.read(module, {suffix: source.tensors[pieces[suffix]] for suffix in row.pieces})

        def run() -> Made:
            dense = stored().dequantize(torch.float32)
            if "pre_quant_scale" in pieces:
                dense = dense * source.tensors[pieces["pre_quant_scale"]].float()
            yield f"{module}.weight", dense.to(source.dtype)

        yield Step({f"{module}.weight": (source.dtype, stored().shape)}, run, (name,))


# --- experts ---------------------------------------------------------------------------------------------
def _expert_steps(
    source: Source,
    prefix: str,
    expert: int,
    projection: str,
    name: str,
    shapes: dict[tuple[str, str], tuple[int, ...]],
) -> Iterator[Step]:
    """One projection of an expert (of each expert, where they are stacked) in the new format."""
    experts = source.experts[prefix]
    if (prefix, projection) not in shapes:
        shapes[prefix, projection] = tuple(experts.projection(expert, projection).shape)
    rows, columns = shapes[prefix, projection]
    if columns % (block := formats.get(source.writer.format).block):
        raise FormatError(
            f"{name}: {source.writer.format} needs columns divisible by {block}, got [{rows}, {columns}]"
        )
    parts = 2 if projection == "gate_up_proj" else 1
    if source.writer.format == "fp8_block" and experts.gated and projection != experts.projections[-1]:
        _require_whole_blocks(name, rows // parts)
    blank = source.writer.pieces(_blank(source.writer.format, rows // parts, columns))
    for e in range(len(experts)) if experts.stacked else (expert,):
        makes: dict[str, Shape] = {}
        for i, part in enumerate(_names(projection, parts)):
            where = f"{prefix}.{e}.{part}"
            beside = [
                *_calibrated(source, prefix, e, part, where),
                *_bias(source, prefix, e, projection, where, i),
            ]
            some = {f"{where}.{suffix}": piece for suffix, piece in blank.items()} | dict(beside)
            makes |= {n: (piece.dtype, tuple(piece.shape)) for n, piece in some.items()}

        def run(e: int = e) -> Made:
            return _expert(source, prefix, e, projection, parts)

        yield Step(makes, run, () if experts.stacked else (name,))


def _require_whole_blocks(name: str, rows: int) -> None:
    """Gate and up are one matrix when they run: a block of both has one scale, which two tensors do not have."""
    if rows % BLOCK:
        raise FormatError(
            f"{name}: fp8_block needs gate and up with rows divisible by {BLOCK}, got {rows}, or nothing reads the result"
        )


def _expert(source: Source, prefix: str, e: int, projection: str, parts: int) -> Made:
    dense = source.experts[prefix].dense(e, projection)
    scale = _shared_scale(source, prefix, e, projection, dense) if source.writer.format == "nvfp4" else None
    for i, (name, part) in enumerate(zip(_names(projection, parts), dense.chunk(parts), strict=True)):
        where = f"{prefix}.{e}.{name}"
        for suffix, piece in source.writer.pieces(_quantised(source, part, scale)).items():
            yield f"{where}.{suffix}", piece
        yield from _calibrated(source, prefix, e, name, where)
        yield from _bias(source, prefix, e, projection, where, i)


def _names(projection: str, parts: int) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if parts == 2 else (projection,)


def _blank(format: str, rows: int, columns: int) -> Any:
    """A tensor of the format without values, for its pieces' dtypes and shapes."""

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    e4m3, u8, f32 = torch.float8_e4m3fn, torch.uint8, torch.float32
    if format == "nvfp4":
        return NVFP4(empty(u8, rows, columns // 2), empty(e4m3, rows, columns // 16), empty(f32))
    if format == "mxfp4":
        return MXFP4(empty(u8, rows, columns // 2), empty(u8, rows, columns // 32))
    if format == "mxfp8":
        return MXFP8(empty(e4m3, rows, columns), empty(u8, rows, columns // 32))
    if format == "int4":
        return INT4.of(empty(u8, rows, columns // 2), empty(torch.bfloat16, rows, columns // INT4.block))
    if format == "fp8_block":
        return FP8Block(empty(e4m3, rows, columns), empty(f32, -(-rows // 128), -(-columns // 128)))
    raise FormatError(f"format must be one that is written, got {format!r}")


def _quantised(source: Source, dense: torch.Tensor, scale: torch.Tensor | None) -> Any:
    if scale is not None:
        return NVFP4.quantize(dense, scale)
    return formats.get(source.writer.format).quantize(dense)


def _shared_scale(source: Source, prefix: str, e: int, projection: str, dense: torch.Tensor) -> torch.Tensor:
    """The global scale of a projection: the same for gate and up, which the second of them finds worked out."""
    experts = source.experts[prefix]
    ups = experts.projections[:-1]
    if projection not in ups or len(ups) == 1:
        return dynamic_global_scale(magnitude(dense, (-2, -1)))
    with source.lock:
        known = source.amax.pop((prefix, e), None)
    if known is None:
        others = [experts.dense(e, name) for name in ups if name != projection]
        known = torch.stack([magnitude(values, (-2, -1)) for values in (dense, *others)]).amax()
        with source.lock:
            source.amax[prefix, e] = known
    return dynamic_global_scale(known)


def _calibrated(source: Source, prefix: str, e: int, name: str, where: str) -> Made:
    seen = source.calibration.get(prefix)
    if seen is None:
        return
    amax = seen["down" if name in ("down_proj", "w2") else "gate_up"]
    # An expert that no token went to takes the largest of the others.
    value = amax[e] if float(amax[e]) > 0 else amax.amax()
    scale = dynamic_global_scale(value.float())
    yield from ((f"{where}.{s}", v) for s, v in source.writer.input_scale(scale).items())


def _bias(source: Source, prefix: str, e: int, projection: str, where: str, part: int) -> Made:
    *ups, down = source.experts[prefix].projections
    bias = source.biases[prefix].get("down_bias" if projection == down else "gate_up_bias")
    if bias is None:
        return
    row = bias[e]
    if projection == "gate_up_proj":
        row = row.chunk(2)[part]
    elif projection != down:
        row = row.chunk(len(ups))[ups.index(projection)]
    yield f"{where}.bias", row

"""The CPU's kernel layouts: panels of 16 rows (csrc/moestro_cpu.h describes the bytes).

A packed tensor has as many bytes as the checkpoint layout (NVFP4 adds a float32 per row), holds the same
values exactly, and answers everything a FormatTensor must. Packing goes expert by expert straight into the
destination; with `donate` that is the source's own storage, and one expert is all the extra memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor
from moestro.kernels.cpu import core

PANEL = 16  # rows of a panel, columns of an NVFP4 block
# source -> ((gated, versions), weak reference to its packed copy); a cache of identities
_shared: Any = weakref.WeakKeyDictionary()
SCALE_SHIFT = 256.0  # the core reads e4m3 bits as half: value · 2^-8; the rest is in row_scale


@dataclass(frozen=True, eq=False)
class PanelBF16:
    """bf16 matrices [E, R, C] in panels; R and C are multiples of 16."""

    data: torch.Tensor  # bfloat16 [E, R/16, C/2, 16, 2]
    gated: bool  # panels alternate gate, up

    format: ClassVar[str] = "bf16"
    layout: ClassVar[str] = "cpu_panels"

    @classmethod
    def pack(cls, source: FormatTensor, gated: bool, donate: bool = False) -> Self:
        """Pack a checkpoint-layout BF16 tensor of bfloat16.

        Raises DTypeError for another dtype, ShapeError for sizes that are no multiples of 16.
        """
        if not isinstance(source, BF16) or source.data.dtype != torch.bfloat16:
            got = source.data.dtype if isinstance(source, BF16) else type(source).__name__
            raise DTypeError(f"the cpu backend packs bf16 weights of torch.bfloat16, got {got}")
        experts, rows, columns = _require_panels(source.shape, gated)
        donate = donate and source.data.is_contiguous()
        out = source.data if donate else _empty((experts, rows, columns), torch.bfloat16)
        pack = core.load().moestro_cpu_pack_bf16
        for e in range(experts):
            dense = source.data[e].clone() if donate else source.data[e].contiguous()
            pack(out[e].data_ptr(), dense.data_ptr(), rows, columns, gated, torch.get_num_threads())
        return cls(out.view(experts, rows // PANEL, columns // 2, PANEL, 2), gated)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, panels, pairs, _, _ = self.data.shape
        return (*lead, panels * PANEL, pairs * 2)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.to_checkpoint().dequantize(dtype)

    def expert(self, index: int) -> PanelBF16:
        return PanelBF16(self.data[index], self.gated)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.data.to(device), self.gated)

    def to_checkpoint(self) -> BF16:
        rows, columns = self.shape[-2:]
        panels = self.data.cpu().view(-1, rows, columns)
        dense = torch.empty_like(panels)
        unpack = core.load().moestro_cpu_unpack_bf16
        for e in range(len(panels)):
            args = (rows, columns, self.gated, torch.get_num_threads())
            unpack(dense[e].data_ptr(), panels[e].data_ptr(), *args)
        return BF16(dense.view(self.shape).to(self.device))


@dataclass(frozen=True, eq=False)
class PanelNVFP4:
    """NVFP4 matrices [E, R, C] in panels; R and C are multiples of 16."""

    codes: torch.Tensor  # uint8 [E, R/16, C/16, 128]
    scale: torch.Tensor  # float8_e4m3fn [E, R/16, C/16, 16]
    global_scale: torch.Tensor  # float32 [E] or [E, G], as in the checkpoint
    row_scale: torch.Tensor  # float32 [E, R], of each row in the panels' order, times SCALE_SHIFT
    gated: bool

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = "cpu_panels"

    @classmethod
    def pack(cls, source: FormatTensor, gated: bool, donate: bool = False) -> Self:
        """Pack a checkpoint-layout NVFP4 tensor.

        Raises FormatError for block scales that are negative or NaN, ShapeError for sizes that are no
        multiples of 16.
        """
        if not isinstance(source, NVFP4):
            raise FormatError(f"the cpu backend packs NVFP4 tensors, got {type(source).__name__}")
        experts, rows, _ = _require_panels(source.shape, gated)
        scale = source.scale.view(torch.uint8)
        if any(bool(((s & 0x7F) == 0x7F).any()) or bool((s & 0x80).any()) for s in scale):
            raise FormatError("scale must hold no NaN and no negative block scales for the cpu backend")
        codes, scales = _pack_fp4(source.packed, scale, gated, donate)
        row_scale = source.row_global_scale().expand(experts, rows, 1).reshape(experts, rows) * SCALE_SHIFT
        per_row = in_panel_order(row_scale, gated)
        return cls(codes, scales.view(torch.float8_e4m3fn), source.global_scale, per_row, gated)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, panels, blocks, _ = self.codes.shape
        return (*lead, panels * PANEL, blocks * PANEL)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.global_scale.nbytes + self.row_scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.to_checkpoint().dequantize(dtype)

    def expert(self, index: int) -> PanelNVFP4:
        return PanelNVFP4(
            self.codes[index], self.scale[index], self.global_scale[index], self.row_scale[index], self.gated
        )

    def to(self, device: torch.device | str) -> Self:
        codes, scale = self.codes.to(device), self.scale.to(device)
        global_scale, row_scale = self.global_scale.to(device), self.row_scale.to(device)
        return type(self)(codes, scale, global_scale, row_scale, self.gated)

    def to_checkpoint(self) -> NVFP4:
        packed, scale = _unpack_fp4(self.codes, self.scale.view(torch.uint8), self.gated)
        return NVFP4(packed, scale.view(torch.float8_e4m3fn), self.global_scale)


@dataclass(frozen=True, eq=False)
class PanelMXFP4:
    """MXFP4 matrices [E, R, C] in panels; R is a multiple of 16, C of 32."""

    codes: torch.Tensor  # uint8 [E, R/16, C/16, 128]
    scale: torch.Tensor  # uint8 [E, R/16, C/32, 16], e8m0
    gated: bool

    format: ClassVar[str] = "mxfp4"
    layout: ClassVar[str] = "cpu_panels"

    @classmethod
    def pack(cls, source: FormatTensor, gated: bool, donate: bool = False) -> Self:
        """Pack a checkpoint-layout MXFP4 tensor.

        Raises FormatError for scales that are NaN, ShapeError for rows that are no multiple of 16.
        """
        if not isinstance(source, MXFP4):
            raise FormatError(f"the cpu backend packs MXFP4 tensors, got {type(source).__name__}")
        _require_panels(source.shape, gated)
        if any(bool((s == 0xFF).any()) for s in source.scale):
            raise FormatError("scale must hold no NaN (255) for the cpu backend")
        return cls(*_pack_fp4(source.packed, source.scale, gated, donate), gated)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, panels, blocks, _ = self.codes.shape
        return (*lead, panels * PANEL, blocks * PANEL)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.to_checkpoint().dequantize(dtype)

    def expert(self, index: int) -> PanelMXFP4:
        return PanelMXFP4(self.codes[index], self.scale[index], self.gated)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.codes.to(device), self.scale.to(device), self.gated)

    def to_checkpoint(self) -> MXFP4:
        return MXFP4(*_unpack_fp4(self.codes, self.scale, self.gated))


Panels = PanelBF16 | PanelNVFP4 | PanelMXFP4
CLASSES: dict[str, type[Panels]] = {cls.format: cls for cls in (PanelBF16, PanelNVFP4, PanelMXFP4)}


def pack(source: FormatTensor, gated: bool, donate: bool = False) -> FormatTensor:
    """`source` in panels; itself if it is already."""
    if isinstance(source, Panels):
        return source
    if source.format not in CLASSES:
        raise FormatError(f"the cpu backend packs {', '.join(CLASSES)}, got {source.format}")
    return CLASSES[source.format].pack(source.to_checkpoint(), gated, donate)


def shared(source: FormatTensor, gated: bool) -> FormatTensor:
    """`source` in panels, one copy for all who ask while somebody holds it and the source is not changed."""
    if isinstance(source, Panels):
        return source
    versions = tuple(t._version for t in counted(source))
    seen, copy = _shared.get(source, (None, None))
    packed = copy() if copy is not None and seen == (gated, versions) else None
    if packed is None:
        packed = pack(source, gated)
        _shared[source] = (gated, versions), weakref.ref(packed)
    return packed


def counted(source: FormatTensor) -> list[torch.Tensor]:
    """The tensors of `source` whose changes in place torch counts (`_version`)."""
    tensors = (value for value in vars(source).values() if isinstance(value, torch.Tensor))
    return [t for t in tensors if not t.is_inference()]


def in_panel_order(per_row: torch.Tensor, gated: bool) -> torch.Tensor:
    """[E, R] in the order of the panels: gate and up panels alternate."""
    if not gated:
        return per_row.contiguous()
    experts, rows = per_row.shape
    return per_row.view(experts, 2, rows // (2 * PANEL), PANEL).transpose(1, 2).reshape(experts, rows)


def _pack_fp4(
    packed: torch.Tensor, scale: torch.Tensor, gated: bool, donate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [E, R, C/2] and [E, R, C/S] to codes [E, R/16, C/16, 128] and scales [E, R/16, C/S, 16]."""
    experts, rows, half = packed.shape
    donate = donate and packed.is_contiguous() and scale.is_contiguous()
    codes = packed if donate else _empty((experts, rows, half), torch.uint8)
    scales = scale if donate else _empty(tuple(scale.shape), torch.uint8)
    per_scale = 2 * half // scale.shape[2]
    for e in range(experts):
        sources = [t[e].clone() if donate else t[e].contiguous() for t in (packed, scale)]
        pieces = [t.data_ptr() for t in (codes[e], scales[e], *sources)]
        core.load().moestro_cpu_pack_fp4(*pieces, rows, 2 * half, per_scale, gated, torch.get_num_threads())
    panels = rows // PANEL
    return codes.view(experts, panels, half // 8, 128), scales.view(experts, panels, scale.shape[2], PANEL)


def _unpack_fp4(codes: torch.Tensor, scales: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What _pack_fp4 took: codes [..., R/16, C/16, 128], scales [..., R/16, C/S, 16] to packed and scale."""
    *lead, panels, blocks, _ = codes.shape
    rows, columns, per_row = panels * PANEL, blocks * PANEL, scales.shape[-2]
    flat = codes.cpu().reshape(-1, rows, columns // 2), scales.cpu().reshape(-1, rows, per_row)
    packed, scale = (torch.empty_like(t) for t in flat)
    for e in range(len(packed)):
        pieces = [t[e].data_ptr() for t in (packed, scale, *flat)]
        per_scale, threads = columns // per_row, torch.get_num_threads()
        core.load().moestro_cpu_unpack_fp4(*pieces, rows, columns, per_scale, gated, threads)
    device = codes.device
    return packed.view(*lead, rows, columns // 2).to(device), scale.view(*lead, rows, per_row).to(device)


def _require_panels(shape: tuple[int, ...], gated: bool) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[1] % (PANEL * (2 if gated else 1)) or shape[2] % PANEL:
        raise ShapeError(
            f"the cpu backend packs [E, R, C] with C (and each half of gated R) divisible by {PANEL}, "
            f"got {list(shape)}"
        )
    experts, rows, columns = shape
    return experts, rows, columns


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    core.load().moestro_cpu_advise_huge(out.data_ptr(), out.nbytes)
    return out

"""The CPU's kernel layouts: panels of 16 rows (csrc/moestro_cpu.h describes the bytes).

A packed tensor has as many bytes as the checkpoint layout (NVFP4 adds a float32 per row), holds the same
values exactly, and answers everything a FormatTensor must. Packing goes expert by expert straight into the
destination; with `donate` each expert's source is given back to the system as soon as it is packed, so that one
copy and one expert are all there ever is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block
from moestro.formats.fp8_block import BLOCK as FP8_BLOCK
from moestro.formats.pages import release
from moestro.formats.pieces import reduced
from moestro.kernels.cpu import core, memory

PANEL = 16  # rows of a panel, columns of an NVFP4 block
# source -> ((gated, versions), weak reference to its packed copy); a cache of identities
_shared: Any = weakref.WeakKeyDictionary()
SCALE_SHIFT = 256.0  # the core reads e4m3 bits as half: value · 2^-8; the rest is in row_scale


class Panels:
    """What the layouts share. The first piece is [E, R/16, ...]: R and C are multiples of 16."""

    format: ClassVar[str]
    layout: ClassVar[str] = "cpu_panels"
    piece_names: ClassVar[tuple[str, ...]]  # the tensors, with the experts as their first dimension
    per_line: ClassVar[int]  # columns that an entry of the first piece's columns stands for
    gated: bool  # panels alternate gate, up

    @property
    def pieces(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.piece_names)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, panels, lines = self.pieces[0].shape[: -len(self.tail)]
        return (*lead, panels * PANEL, lines * self.per_line)

    tail: ClassVar[tuple[int, ...]]  # of the first piece's shape

    @property
    def device(self) -> torch.device:
        return self.pieces[0].device

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.to_checkpoint().dequantize(dtype, out=out)

    def __reduce__(self) -> Any:
        return reduced(self)

    def expert(self, index: int) -> Self:
        return self._with(piece[index] for piece in self.pieces)

    def to(self, device: torch.device | str) -> Self:
        return self._with(piece.to(device) for piece in self.pieces)

    def _with(self, pieces: Iterable[torch.Tensor]) -> Self:
        return type(self)(*pieces, self.gated)  # type: ignore[call-arg]

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        """Room for `experts` matrices [R, C] like `first`, a tensor in the checkpoint layout."""
        raise NotImplementedError

    def put(self, index: int, source: FormatTensor) -> None:
        """Pack one expert's matrix [R, C], in the checkpoint layout.

        Raises FormatError, DTypeError or ShapeError for what does not fit.
        """
        raise NotImplementedError

    def to_checkpoint(self) -> FormatTensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PanelBF16(Panels):
    """bf16 matrices [E, R, C]."""

    data: torch.Tensor  # bfloat16 [E, R/16, C/2, 16, 2]
    gated: bool

    format: ClassVar[str] = "bf16"
    piece_names: ClassVar[tuple[str, ...]] = ("data",)
    per_line: ClassVar[int] = 2
    tail: ClassVar[tuple[int, ...]] = (PANEL, 2)

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        rows, columns = first.shape
        return cls(_empty((experts, rows // PANEL, columns // 2, PANEL, 2), torch.bfloat16), gated)

    def put(self, index: int, source: FormatTensor) -> None:
        if not isinstance(source, BF16) or source.data.dtype != torch.bfloat16:
            got = source.data.dtype if isinstance(source, BF16) else type(source).__name__
            raise DTypeError(f"the cpu backend packs bf16 weights of torch.bfloat16, got {got}")
        dense = source.data.contiguous()
        args = (*source.shape, self.gated, torch.get_num_threads())
        core.load().moestro_cpu_pack_bf16(self.data[index].data_ptr(), dense.data_ptr(), *args)

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
class PanelFP8(Panels):
    """FP8-block matrices [E, R, C]: a scale per B x B of them, which panels of 16 rows do not cross."""

    data: torch.Tensor  # float8_e4m3fn [E, R/16, C/2, 16, 2]
    scale_inv: torch.Tensor  # float32 [E, ceil(R/B), ceil(C/B)], as in the checkpoint
    panel_scale: (
        torch.Tensor
    )  # float32 [E, R/16, ceil(C/B)], of each panel in the panels' order, times SCALE_SHIFT
    gated: bool

    format: ClassVar[str] = "fp8_block"
    piece_names: ClassVar[tuple[str, ...]] = ("data", "scale_inv", "panel_scale")
    per_line: ClassVar[int] = 2
    tail: ClassVar[tuple[int, ...]] = (PANEL, 2)
    block_columns: ClassVar[int] = FP8_BLOCK

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        rows, columns = first.shape
        data = _empty((experts, rows // PANEL, columns // 2, PANEL, 2), torch.uint8)
        scale_inv = torch.empty((experts, *first.scale_inv.shape), dtype=torch.float32)
        panel_scale = torch.empty((experts, rows // PANEL, first.scale_inv.shape[-1]), dtype=torch.float32)
        return cls(data.view(torch.float8_e4m3fn), scale_inv, panel_scale, gated)

    def put(self, index: int, source: FormatTensor) -> None:
        if not isinstance(source, FP8Block):
            raise FormatError(f"the cpu backend packs FP8Block tensors, got {type(source).__name__}")
        data = source.data.view(torch.uint8).contiguous()
        if bool(((data & 0x7F) == 0x7F).any()):
            raise FormatError("data must hold no NaN for the cpu backend")
        args = (*source.shape, self.gated, torch.get_num_threads())
        core.load().moestro_cpu_pack_fp8(self.data[index].data_ptr(), data.data_ptr(), *args)
        self.scale_inv[index] = source.scale_inv
        first_rows = torch.arange(0, source.shape[0], PANEL)  # of each panel, in the checkpoint's order
        order = in_panel_order(first_rows.repeat_interleave(PANEL)[None], self.gated)[0, ::PANEL]
        self.panel_scale[index] = source.scale_inv[order // self.block_columns] * SCALE_SHIFT

    def to_checkpoint(self) -> FP8Block:
        rows, columns = self.shape[-2:]
        panels = self.data.cpu().view(torch.uint8).view(-1, rows, columns)
        dense = torch.empty_like(panels)
        for e in range(len(panels)):
            args = (rows, columns, self.gated, torch.get_num_threads())
            core.load().moestro_cpu_unpack_fp8(dense[e].data_ptr(), panels[e].data_ptr(), *args)
        return FP8Block(dense.view(torch.float8_e4m3fn).view(self.shape).to(self.device), self.scale_inv)


class PanelsFP4(Panels):
    """What NVFP4 and MXFP4 share: codes, and scales per 16 or 32 columns."""

    codes: torch.Tensor
    scale: torch.Tensor

    per_line: ClassVar[int] = PANEL
    tail: ClassVar[tuple[int, ...]] = (128,)

    @staticmethod
    def room(experts: int, first: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """codes [E, R/16, C/16, 128] and scales [E, R/16, C/S, 16] for matrices like `first`."""
        rows, columns = first.shape
        codes = PanelsFP4.room_of_codes(experts, rows, columns)
        return codes, _empty((experts, rows // PANEL, first.scale.shape[-1], PANEL), torch.uint8)

    @staticmethod
    def room_of_codes(experts: int, rows: int, columns: int) -> torch.Tensor:
        """codes [E, R/16, C/16, 128]."""
        return _empty((experts, rows // PANEL, columns // PANEL, 128), torch.uint8)

    def put_codes(self, index: int, packed: torch.Tensor, scale: torch.Tensor) -> None:
        """Bytes [R, C/2] and [R, C/S] to the panels of an expert."""
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        pieces = [self.codes[index], self.scale[index], packed.contiguous(), scale.contiguous()]
        args = (rows, columns, columns // scale.shape[1], self.gated, torch.get_num_threads())
        core.load().moestro_cpu_pack_fp4(*(t.data_ptr() for t in pieces), *args)

    def take_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What put_codes took, of all experts, with scales as bytes."""
        *lead, rows, columns = self.shape
        per_row = self.scale.shape[-2]
        scales = self.scale.view(torch.uint8).cpu().reshape(-1, rows, per_row)
        flat = self.codes.cpu().reshape(-1, rows, columns // 2), scales
        packed, scale = (torch.empty_like(t) for t in flat)
        for e in range(len(packed)):
            pieces = [t[e].data_ptr() for t in (packed, scale, *flat)]
            args = (rows, columns, columns // per_row, self.gated, torch.get_num_threads())
            core.load().moestro_cpu_unpack_fp4(*pieces, *args)
        shapes = ((*lead, rows, columns // 2), (*lead, rows, per_row))
        return packed.view(shapes[0]).to(self.device), scale.view(shapes[1]).to(self.device)


@dataclass(frozen=True, eq=False)
class PanelNVFP4(PanelsFP4):
    """NVFP4 matrices [E, R, C]."""

    codes: torch.Tensor  # uint8 [E, R/16, C/16, 128]
    scale: torch.Tensor  # float8_e4m3fn [E, R/16, C/16, 16]
    global_scale: torch.Tensor  # float32 [E] or [E, G], as in the checkpoint
    row_scale: torch.Tensor  # float32 [E, R], of each row in the panels' order, times SCALE_SHIFT
    gated: bool

    format: ClassVar[str] = "nvfp4"
    piece_names: ClassVar[tuple[str, ...]] = ("codes", "scale", "global_scale", "row_scale")

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        codes, scale = cls.room(experts, first)
        global_scale = torch.empty((experts, *first.global_scale.shape), dtype=torch.float32)
        row_scale = torch.empty((experts, first.shape[0]), dtype=torch.float32)
        return cls(codes, scale.view(torch.float8_e4m3fn), global_scale, row_scale, gated)

    def put(self, index: int, source: FormatTensor) -> None:
        if not isinstance(source, NVFP4):
            raise FormatError(f"the cpu backend packs NVFP4 tensors, got {type(source).__name__}")
        scale = source.scale.view(torch.uint8)
        if bool(((scale & 0x7F) == 0x7F).any()) or bool((scale & 0x80).any()):
            raise FormatError("scale must hold no NaN and no negative block scales for the cpu backend")
        self.put_codes(index, source.packed, scale)
        rows = source.shape[0]
        row_scale = source.row_global_scale().expand(rows, 1).reshape(1, rows) * SCALE_SHIFT
        self.row_scale[index] = in_panel_order(row_scale, self.gated)[0]
        self.global_scale[index] = source.global_scale

    def to_checkpoint(self) -> NVFP4:
        packed, scale = self.take_codes()
        return NVFP4(packed, scale.view(torch.float8_e4m3fn), self.global_scale)


@dataclass(frozen=True, eq=False)
class PanelMXFP4(PanelsFP4):
    """MXFP4 matrices [E, R, C]; C is a multiple of 32."""

    codes: torch.Tensor  # uint8 [E, R/16, C/16, 128]
    scale: torch.Tensor  # uint8 [E, R/16, C/32, 16], e8m0
    gated: bool

    format: ClassVar[str] = "mxfp4"
    piece_names: ClassVar[tuple[str, ...]] = ("codes", "scale")

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        return cls(*cls.room(experts, first), gated)

    def put(self, index: int, source: FormatTensor) -> None:
        if not isinstance(source, MXFP4):
            raise FormatError(f"the cpu backend packs MXFP4 tensors, got {type(source).__name__}")
        if bool((source.scale == 0xFF).any()):
            raise FormatError("scale must hold no NaN (255) for the cpu backend")
        self.put_codes(index, source.packed, source.scale)

    def to_checkpoint(self) -> MXFP4:
        return MXFP4(*self.take_codes())


# By format; layout_int4.py adds its own.
CLASSES: dict[str, type[Panels]] = {cls.format: cls for cls in (PanelBF16, PanelNVFP4, PanelMXFP4, PanelFP8)}


class Packer:
    """Packs one expert after the other; the first says what all are like."""

    def __init__(self, experts: int, gated: bool) -> None:
        self._experts, self._gated = experts, gated
        self._shape: tuple[int, ...] = ()
        self._panels: Panels | None = None

    def put(self, index: int, source: FormatTensor) -> None:
        """An expert's matrix [R, C], in the checkpoint layout.

        Raises FormatError, DTypeError or ShapeError for one that cannot be packed or differs from the first.
        """
        if self._panels is None:
            if source.format not in CLASSES:
                raise FormatError(f"the cpu backend packs {', '.join(CLASSES)}, got {source.format}")
            _require_panels(source.shape, self._gated)
            self._shape = source.shape
            self._panels = CLASSES[source.format].empty(self._experts, source, self._gated)
        if source.shape != self._shape:
            raise ShapeError(f"experts must all be {list(self._shape)}, got {list(source.shape)}")
        self._panels.put(index, source)

    def done(self) -> Panels:
        """All experts in panels. Raises ShapeError if there were none."""
        if self._panels is None:
            raise ShapeError("weights must hold at least one expert to be packed, got none")
        return self._panels


def pack(source: FormatTensor, gated: bool, donate: bool = False) -> FormatTensor:
    """`source` [E, R, C] in panels; itself if it is already."""
    if isinstance(source, Panels):
        return source
    if source.format not in CLASSES:
        raise FormatError(f"the cpu backend packs {', '.join(CLASSES)}, got {source.format}")
    source = source.to_checkpoint()
    if len(source.shape) != 3:
        raise ShapeError(f"the cpu backend packs [E, R, C], got {list(source.shape)}")
    packer = Packer(source.shape[0], gated)
    for e in range(source.shape[0]):
        one = source.expert(e)
        packer.put(e, one)
        if donate:
            release(value for value in vars(one).values() if isinstance(value, torch.Tensor))
    return packer.done()


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


def _require_panels(shape: tuple[int, ...], gated: bool) -> None:
    if len(shape) != 2 or shape[0] % (PANEL * (2 if gated else 1)) or shape[1] % PANEL:
        raise ShapeError(
            f"the cpu backend packs [E, R, C] with C (and each half of gated R) divisible by {PANEL}, "
            f"got experts of {list(shape)}"
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    memory.prepare(out)
    return out

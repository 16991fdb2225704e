"""INT4 in panels: codes as those of FP4, with scales (in the checkpoint's dtype) and zero points by rows of a panel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from moestro.errors import FormatError
from moestro.formats import INT4, FormatTensor
from moestro.kernels.cpu import core
from moestro.kernels.cpu.layout import CLASSES, PANEL, PanelsFP4, in_panel_order


@dataclass(frozen=True, eq=False)
class PanelINT4(PanelsFP4):
    """INT4 matrices [E, R, C]; scales and zero points in the panels' order of rows."""

    codes: torch.Tensor  # uint8 [E, R/16, C/16, 128]
    scale: torch.Tensor  # bfloat16, float16 or float32 [E, R/16, C/G, 16]
    zero: torch.Tensor  # uint8 [E, R/16, C/G, 16]; [E, R/16, 0, 16] where all are 8
    gated: bool

    format: ClassVar[str] = "int4"
    piece_names: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")

    @property
    def group(self) -> int:
        """Columns under one scale."""
        return self.shape[-1] // self.scale.shape[-2]

    @classmethod
    def empty(cls, experts: int, first: Any, gated: bool) -> Self:
        rows, columns = first.shape
        codes = cls.room_of_codes(experts, rows, columns)
        scale = torch.empty((experts, rows // PANEL, first.scale.shape[-1], PANEL), dtype=first.scale.dtype)
        return cls(
            codes, scale, codes.new_empty((experts, rows // PANEL, first.zero.shape[-1], PANEL)), gated
        )

    def put(self, index: int, source: FormatTensor) -> None:
        if not isinstance(source, INT4):
            raise FormatError(f"the cpu backend packs INT4 tensors, got {type(source).__name__}")
        got = source.scale.dtype, source.scale.shape[-1], source.zero.shape[-1]
        if got != (wanted := (self.scale.dtype, self.scale.shape[-2], self.zero.shape[-2])):
            raise FormatError(
                f"experts must all have scales and zero points as the first, {wanted[0]} and {wanted[1:]} a row, got {got}"
            )
        rows, columns = source.shape
        packed, nothing = source.packed.contiguous(), packed_nothing()
        pieces = (self.codes[index], nothing, packed, nothing)
        args = (rows, columns, 2 * columns, self.gated, torch.get_num_threads())  # no scale bytes a row
        core.load().moestro_cpu_pack_fp4(*(t.data_ptr() for t in pieces), *args)
        order = self._order(rows)
        for mine, theirs in ((self.scale, source.scale), (self.zero, source.zero)):
            mine[index] = theirs[order].view(rows // PANEL, PANEL, theirs.shape[-1]).transpose(1, 2)

    def _order(self, rows: int) -> torch.Tensor:
        """The checkpoint's row of each of the panels' rows."""
        return in_panel_order(torch.arange(rows)[None], self.gated)[0]

    def to_checkpoint(self) -> INT4:
        *lead, rows, columns = self.shape
        flat, nothing = self.codes.cpu().reshape(-1, rows, columns // 2), packed_nothing()
        packed = torch.empty_like(flat)
        for e in range(len(packed)):
            pieces = [t.data_ptr() for t in (packed[e], nothing, flat[e], nothing)]
            args = (rows, columns, 2 * columns, self.gated, torch.get_num_threads())
            core.load().moestro_cpu_unpack_fp4(*pieces, *args)
        back = self._order(rows).argsort()
        by_row = (
            t.transpose(-1, -2).reshape(*lead, rows, -1 if t.numel() else 0) for t in (self.scale, self.zero)
        )
        scale, zero = (t.index_select(-2, back.to(t.device)) for t in by_row)
        return INT4(packed.view(*lead, rows, columns // 2).to(self.device), scale, zero)


def packed_nothing() -> torch.Tensor:
    """The place of scale bytes where there are none."""
    return torch.empty(PANEL, dtype=torch.uint8)


CLASSES[PanelINT4.format] = PanelINT4

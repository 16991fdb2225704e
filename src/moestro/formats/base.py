"""What every number format offers: a tensor of experts' weights that knows its own layout.

A format tensor stands for a dense tensor [..., R, C] (R rows, C columns; C is the dimension that a matrix
product sums over). Its `layout` is "checkpoint" as loaded, or the name of a backend's kernel layout after
`prepare`; both answer the same questions, so code that only needs values works on either.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import torch

CHECKPOINT = "checkpoint"


@runtime_checkable
class FormatTensor(Protocol):
    """A (possibly quantised) tensor standing for dense values [..., R, C]."""

    @property
    def format(self) -> str:
        """The format's name: "bf16", "nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4"."""

    @property
    def layout(self) -> str:
        """ "checkpoint", or the kernel layout that a backend's prepare() made."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape [..., R, C]."""

    @property
    def device(self) -> torch.device:
        """Where the pieces are; all are on one device."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense values [..., R, C]; in `out`, contiguous and of `dtype`, where there is one."""

    def expert(self, index: int) -> FormatTensor:
        """The tensor [..., R, C] at `index` of the first dimension, without a copy."""

    def to(self, device: torch.device | str) -> Self:
        """The same tensor on another device."""

    def to_checkpoint(self) -> FormatTensor:
        """The same values in the checkpoint layout (self if they are)."""

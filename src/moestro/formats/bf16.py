"""bf16: dense weights, kept as they are. float16 and float32 are held too, in their own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import ShapeError
from moestro.formats.checks import require_dtype, require_float_dtype
from moestro.formats.pieces import Pieces, dense_out, join_rows

HELD = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class BF16(Pieces):
    """Dense values [..., R, C].

    Raises DTypeError unless data is bfloat16, float16 or float32, ShapeError below two dimensions.
    """

    data: torch.Tensor  # [..., R, C]

    format: ClassVar[str] = "bf16"
    piece_names: ClassVar[tuple[str, ...]] = ("data",)
    block: ClassVar[int] = 1  # columns that share a scale: C is a multiple of it

    def __post_init__(self) -> None:
        require_dtype("data", self.data, *HELD)
        if self.data.ndim < 2:
            raise ShapeError(f"data must have at least 2 dimensions [..., R, C], got {list(self.data.shape)}")

    @classmethod
    def quantize(cls, dense: torch.Tensor) -> Self:
        """Hold `dense` [..., R, C] without a copy or a change of dtype."""
        return cls(dense)

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """Tensors [..., R_i, C] to one [..., ΣR_i, C]: gate and up to gate_up."""
        (data,) = cls._matching(parts, but=-2)
        return cls(join_rows(data))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return tuple(self.data.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values [..., R, C] in `dtype`: the data itself where it has that dtype, a copy in `out`."""
        require_float_dtype(dtype)
        if out is None:
            return self.data.to(dtype)
        return dense_out(out, self.shape, dtype, self.device).copy_(self.data)

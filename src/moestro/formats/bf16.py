"""bf16: dense weights, kept as they are. float16 and float32 are held too, in their own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from moestro.errors import ShapeError
from moestro.formats.base import CHECKPOINT
from moestro.formats.checks import require_dtype, require_leading, require_parts

HELD = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class BF16:
    """Dense values [..., R, C].

    Raises DTypeError unless data is bfloat16, float16 or float32, ShapeError unless it has two dimensions or
    more.
    """

    data: torch.Tensor  # [..., R, C]

    format: ClassVar[str] = "bf16"
    layout: ClassVar[str] = CHECKPOINT
    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_dtype("data", self.data, *HELD)
        if self.data.ndim < 2:
            raise ShapeError(f"data must have at least 2 dimensions [..., R, C], got {list(self.data.shape)}")

    @classmethod
    def quantize(cls, dense: torch.Tensor) -> Self:
        """Hold `dense` [..., R, C] without a copy or a change of dtype."""
        return cls(dense)

    @classmethod
    def stack(cls, parts: Sequence[BF16]) -> Self:
        """Tensors [R, C] of single experts to one [E, R, C]."""
        (data,) = require_parts(parts, lambda part: (part.data,))
        return cls(torch.stack(data))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [..., R, C] in `dtype`; the data itself, not a copy, where it has that dtype."""
        return self.data.to(dtype)

    def expert(self, index: int) -> BF16:
        """[..., R, C] at `index` of the first dimension, without a copy."""
        require_leading(self.shape)
        return BF16(self.data[index])

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.data.to(device))

    def to_checkpoint(self) -> BF16:
        return self

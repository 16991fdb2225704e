"""FP8 in blocks: e4m3 values with a float32 scale per 128 x 128, as DeepSeek-V3's checkpoints (arXiv
2412.19437 §3.3).

value = data · scale_inv of its block. Blocks at the right and lower edge are as small as the matrix makes
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F  # noqa: N812

from moestro.errors import ShapeError
from moestro.formats.checks import (
    require_dense,
    require_dtype,
    require_finite,
    require_one_device,
    require_scale,
    require_shape,
)
from moestro.formats.pieces import CPU_CHUNK, DEVICE_CHUNK, Pieces, dense_out, join_rows, magnitude, matrices

BLOCK = 128
MAX = 448.0  # the largest e4m3
MIN_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class FP8Block(Pieces):
    """Values [..., R, C] as e4m3 with a scale per block of 128 x 128; any R and C.

    Raises DTypeError, ShapeError or DeviceError where the pieces do not fit together.
    """

    data: torch.Tensor  # float8_e4m3fn [..., R, C]
    scale_inv: torch.Tensor  # float32 [..., ceil(R/128), ceil(C/128)]; multiplies, for all its name

    format: ClassVar[str] = "fp8_block"
    piece_names: ClassVar[tuple[str, ...]] = ("data", "scale_inv")
    block: ClassVar[int] = 1  # C need not be a multiple of anything

    def __post_init__(self) -> None:
        require_dtype("data", self.data, torch.float8_e4m3fn)
        require_dtype("scale_inv", self.scale_inv, torch.float32)
        require_one_device(data=self.data, scale_inv=self.scale_inv)
        if self.data.ndim < 2:
            raise ShapeError(f"data must have at least 2 dimensions [..., R, C], got {list(self.data.shape)}")
        *lead, rows, columns = self.data.shape
        require_shape(
            "scale_inv", self.scale_inv, (*lead, -(-rows // BLOCK), -(-columns // BLOCK)), "one per 128 x 128"
        )

    @classmethod
    def quantize(cls, dense: torch.Tensor) -> Self:
        """Quantise `dense` [..., R, C] of any floating dtype, with little memory beside the result.

        scale_inv is a block's amax / 448, 1 for zeros, at least 2^-126. Raises FormatError for infinities and
        NaN. Reads the largest magnitude back to the host.
        """
        require_dense("dense", dense)
        require_finite("dense", dense, magnitude(dense, (-2, -1)), cls.format)
        *lead, rows, columns = dense.shape
        data = dense.new_empty(dense.shape, dtype=torch.float8_e4m3fn)
        scale_inv = dense.new_empty((*lead, -(-rows // BLOCK), -(-columns // BLOCK)), dtype=torch.float32)
        for x, d, s in _block_row_chunks(dense, data, scale_inv):
            padded = F.pad(x.float(), (0, -columns % BLOCK, 0, -x.shape[0] % BLOCK))
            blocks = padded.view(s.shape[0], BLOCK, s.shape[1], BLOCK)
            amax = magnitude(blocks, (1, 3))
            s.copy_(torch.where(amax == 0, 1.0, (amax / torch.full_like(amax, MAX)).clamp(min=MIN_SCALE)))
            codes = (blocks / s[:, None, :, None]).clamp_(-MAX, MAX).to(torch.float8_e4m3fn)
            d.copy_(codes.view(padded.shape)[: x.shape[0], :columns])
        return cls(data, scale_inv)

    @classmethod
    def cat_rows(cls, parts: Sequence[Self]) -> Self:
        """Tensors [..., R_i, C] to one [..., ΣR_i, C].

        ShapeError unless all R_i but the last are multiples of 128.
        """
        pieces = cls._matching(parts, but=-2)
        for i, part in enumerate(parts[:-1]):
            if part.shape[-2] % BLOCK:
                raise ShapeError(f"parts[{i}] must have rows divisible by {BLOCK}, got {list(part.shape)}")
        return cls(*map(join_rows, pieces))

    def check_scales(self, name: str, start: int = 0) -> None:
        """FormatError for a scale that is negative or not finite; 0 is what a block of zeros may have."""
        require_scale(f"{name}.scale_inv", self.scale_inv, zero=True, start=start)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., R, C]."""
        return tuple(self.data.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """data · scale_inv [..., R, C], rounded to float32 (or float64) and then to dtype."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        out = dense_out(out, self.shape, dtype, self.device)
        for values, data, scale in _block_row_chunks(out, self.data, self.scale_inv):
            rows, columns = data.shape
            factors = scale.to(compute).repeat_interleave(BLOCK, dim=1)[:, :columns]  # [R/128, C]
            whole = rows // BLOCK * BLOCK
            head = data[:whole].to(compute).view(-1, BLOCK, columns).mul_(factors[: whole // BLOCK, None])
            values[:whole] = head.view(whole, columns)
            values[whole:] = data[whole:].to(compute).mul_(factors[whole // BLOCK :])
        return out


def _block_row_chunks(
    first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Views of the same whole rows of blocks, a chunk at a time, of one matrix after the other."""
    rows, columns = first.shape[-2:]
    limit = CPU_CHUNK if first.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, limit // (BLOCK * max(1, columns)))  # rows of blocks
    for a, b, s in matrices(first, second, scale):
        for i in range(0, s.shape[0], step):
            at = slice(i * BLOCK, min(rows, (i + step) * BLOCK))
            yield a[at], b[at], s[i : i + step]

"""INT4 experts on disk, as int32 words of eight codes: compressed-tensors `pack-quantized`, AutoAWQ's and GPTQ's.

| maker | weight | words hold | zero points | scales |
|---|---|---|---|---|
| compressed-tensors | [R, C/8] | 8 columns in order | [R/8, C/G], 8 rows in order; none if symmetric | [R, C/G] |
| AWQ (gemm) | [C, R/8] | 8 rows in the order 0 2 4 6 1 3 5 7 | [C/G, R/8], likewise | [C/G, R] |
| GPTQ | [C/8, R] | 8 columns in order | [C/G, R/8], 8 rows in order, less 1 | [C/G, R] |

Sources: compressed-tensors 0.20 (compressors/pack_quantized), AutoAWQ (awq/modules/linear/gemm.py), AutoGPTQ
(auto_gptq/nn_modules/qlinear), whose format the field calls "gptq" (v1)."""

from __future__ import annotations

import torch

from moestro.errors import FormatError, ShapeError
from moestro.formats import INT4
from moestro.formats.checks import require_dtype

WORD = 8  # codes of an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is row order[i]


def from_compressed_tensors(
    packed: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor, zero: torch.Tensor | None = None
) -> INT4:
    """weight_packed int32 [R, C/8], weight_scale [R, C/G], weight_shape [2], weight_zero_point int32 [ceil(R/8), C/G]."""
    _require_words(weight_packed=packed, weight_zero_point=zero)
    if shape.numel() != 2:
        raise ShapeError(f"weight_shape must hold 2 sizes, got {list(shape.shape)}")
    rows, columns = (int(size) for size in shape.flatten().tolist())
    if tuple(packed.shape) != (rows, columns // WORD) or columns % WORD:
        bits = 32 * packed.shape[-1] / max(1, columns)
        raise FormatError(
            f"weight_packed must be [{rows}, {columns}/8] of 4 bits, as weight_shape says, "
            f"got {list(packed.shape)}, which is {bits:g} bits a weight"
        )
    codes = packed.contiguous().view(torch.uint8)
    if zero is None:
        return INT4.of(codes, scale)
    groups = scale.shape[-1]
    if tuple(zero.shape) != (-(-rows // WORD), groups):
        raise ShapeError(
            f"weight_zero_point must be [{-(-rows // WORD)}, {groups}] (8 rows a word), got {list(zero.shape)}"
        )
    zeros = unpacked(zero.mT)[:, :rows].mT  # [R, C/G]
    return INT4(codes, scale, zeros.contiguous())


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> INT4:
    """qweight int32 [C, R/8], qzeros int32 [C/G, R/8], scales [C/G, R]."""
    _require_words(qweight=qweight, qzeros=qzeros)
    columns, rows = qweight.shape[0], scales.shape[-1]
    if rows % WORD or tuple(qweight.shape) != (columns, rows // WORD):
        if tuple(qweight.shape[1:]) == (rows,):
            raise FormatError("GPTQ must have a g_idx, which says that its columns are in order, got none")
        raise ShapeError(
            f"qweight must be [C, R/8] with R={rows} as in scales (AWQ's gemm layout), got {list(qweight.shape)}"
        )
    _require_zeros(qzeros, scales)
    codes, zeros = unpacked(qweight, AWQ_ORDER), unpacked(qzeros, AWQ_ORDER)
    return INT4(_nibbles(codes.mT.contiguous()), scales.mT.contiguous(), zeros.mT.contiguous())


def from_gptq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> INT4:
    """qweight int32 [C/8, R], qzeros int32 [C/G, R/8] (zero - 1), scales [C/G, R], g_idx int32 [C]."""
    _require_words(qweight=qweight, qzeros=qzeros)
    words, rows = qweight.shape
    columns, groups = words * WORD, scales.shape[0]
    if tuple(g_idx.shape) != (columns,) or not groups or columns % groups or scales.shape[1:] != (rows,):
        raise ShapeError(
            f"scales must be [C/G, {rows}] and g_idx [{columns}], got {list(scales.shape)} and {list(g_idx.shape)}"
        )
    if not torch.equal(g_idx.long(), torch.arange(columns) // (columns // groups)):
        raise FormatError(
            "g_idx must have columns in the order of their groups: desc_act=True (activation order) is not read"
        )
    _require_zeros(qzeros, scales)
    codes, zeros = unpacked(qweight.mT), unpacked(qzeros) + 1  # [R, C], [C/G, R]
    return INT4(_nibbles(codes), scales.mT.contiguous(), zeros.mT.contiguous())


def to_compressed_tensors(q: INT4) -> dict[str, torch.Tensor]:
    """The tensors of a projection [R, C] by suffix. FormatError for a zero point of 16, which 4 bits do not hold."""
    rows, columns = q.shape
    pieces = {
        "weight_packed": _int32(q.packed),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not q.symmetric:
        if int(q.zero.max()) > 15:
            raise FormatError("zero must be at most 15 for compressed-tensors, got 16 (from GPTQ)")
        padded = torch.nn.functional.pad(q.zero.mT, (0, -rows % WORD))  # [C/G, 8 · ceil(R/8)]
        pieces["weight_zero_point"] = _int32(_nibbles(padded)).mT.contiguous()
    return pieces


def unpacked(words: torch.Tensor, order: tuple[int, ...] = tuple(range(WORD))) -> torch.Tensor:
    """int32 [A, B] to its codes, uint8 [A, 8 B]: nibble i of a word at position order[i]."""
    contiguous = words.reshape(-1).view(torch.uint8)
    codes = torch.stack([contiguous & 15, contiguous >> 4], -1).view(*words.shape, WORD)
    at = torch.tensor([order.index(i) for i in range(WORD)])
    return codes[..., at].flatten(-2)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [A, C] of codes to [A, C/2], the low nibble first."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _int32(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [A, 4 B] to int32 [A, B]; through one dimension, since one row may have any stride."""
    return nibbles.reshape(-1).view(torch.int32).view(len(nibbles), -1)


def _require_words(**given: torch.Tensor | None) -> None:
    """Raise unless these are matrices of int32 words: other bytes would be read as other codes."""
    for name, words in given.items():
        if words is None:
            continue
        require_dtype(name, words, torch.int32)
        if words.ndim != 2:
            raise ShapeError(f"{name} must be a matrix, got {list(words.shape)}")


def _require_zeros(qzeros: torch.Tensor, scales: torch.Tensor) -> None:
    groups, rows = scales.shape
    if tuple(qzeros.shape) != (groups, rows // WORD):
        raise ShapeError(f"qzeros must be [{groups}, {rows}/8] as scales, got {list(qzeros.shape)}")

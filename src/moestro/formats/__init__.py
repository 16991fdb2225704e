"""Number formats of weights and activations: quantise, dequantise, pack, checkpoint layouts.

Each is a frozen dataclass of its pieces that satisfies FormatTensor, with a classmethod `quantize(dense)`.
"""

from __future__ import annotations

from typing import Final

from moestro.errors import FormatError, unknown_name
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.formats.bf16 import BF16
from moestro.formats.fp8_block import FP8Block
from moestro.formats.int4 import INT4
from moestro.formats.mxfp4 import MXFP4
from moestro.formats.mxfp8 import MXFP8
from moestro.formats.nvfp4 import NVFP4

__all__ = [
    "BF16",
    "CHECKPOINT",
    "FORMATS",
    "INT4",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "FP8Block",
    "FormatTensor",
    "get",
]

Format = type[BF16] | type[NVFP4] | type[MXFP4] | type[MXFP8] | type[FP8Block] | type[INT4]

FORMATS: Final[dict[str, Format]] = {cls.format: cls for cls in (BF16, NVFP4, MXFP4, MXFP8, FP8Block, INT4)}


def get(name: str) -> Format:
    """The class of a format. Raises FormatError for an unknown name, with the nearest known ones."""
    if name not in FORMATS:
        raise FormatError(unknown_name("format", name, FORMATS))
    return FORMATS[name]

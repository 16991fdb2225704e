"""Number formats of weights and activations: quantise, dequantise, pack, checkpoint layouts.

Each is a frozen dataclass of its pieces that satisfies FormatTensor, with a classmethod `quantize(dense)`.
"""

from __future__ import annotations

from typing import Final

from moestro.errors import FormatError, unknown_name
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.formats.bf16 import BF16
from moestro.formats.nvfp4 import NVFP4

__all__ = ["BF16", "CHECKPOINT", "FORMATS", "NVFP4", "FormatTensor", "get"]

FORMATS: Final = {cls.format: cls for cls in (BF16, NVFP4)}


def get(name: str) -> type[BF16] | type[NVFP4]:
    """The class of a format. Raises FormatError for an unknown name, with the nearest known ones."""
    if name not in FORMATS:
        raise FormatError(unknown_name("format", name, FORMATS))
    return FORMATS[name]

"""Source text of the kernels in CUDA C++: constants as definitions, the primitives, a product for each width, the kernel.

NVRTC gets one text and no folders. A wgmma names each of its registers, so device/mma.cuh has marks in their place.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.kernels.activations import Code

DEVICE = Path(__file__).parent / "device"


@functools.cache
def _text(name: str) -> str:
    return (DEVICE / name).read_text()


def definitions(constants: Mapping[str, Any]) -> str:
    """A #define for each, and for the number of each activation; floats as the nearest float32, infinite ones too."""
    named = {code.name: code.value for code in Code} | dict(constants)
    return "".join(f"#define {name} {_literal(value)}\n" for name, value in named.items())


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, float):
        return str(value)
    nearest = ctypes.c_float(value).value
    if math.isfinite(nearest):
        return f"{nearest.hex()}f"
    return f"__uint_as_float(0x{ctypes.c_uint32.from_buffer(ctypes.c_float(nearest)).value:x}u)"


def product(width: int) -> str:
    """Mma<width>: device/mma.cuh with the names of its registers."""
    sums = width // 2
    names = {
        "WIDTH": str(width),
        "SUMS": ", ".join(f"%{i}" for i in range(sums)),
        "OUTPUTS": ", ".join(f'"+f"(part[{i}])' for i in range(sums)),
        "A": ", ".join(f"%{sums + i}" for i in range(4)),
        "B": f"%{sums + 4}",
        "GO_ON": f"%{sums + 5}",
        "A_SHARED": f"%{sums}",
        "B_SHARED": f"%{sums + 1}",
        "GO_ON_SHARED": f"%{sums + 2}",
    }
    text = _text("mma.cuh")
    for name, value in names.items():
        text = text.replace(f"@{name}@", value)
    return text


def hopper(widths: Sequence[int]) -> str:
    """The primitives, and the products of `widths`: pairs, or rows of weights."""
    products = ["template <int W> struct Mma;\n", *map(product, widths)] if widths else []
    return "\n".join([_text("hopper.cuh"), "".join(products)])


def source(
    files: Sequence[str],
    constants: Mapping[str, Any],
    widths: Sequence[int] = (),
    primitives: Callable[[Sequence[int]], str] = hopper,
) -> str:
    """All of a kernel: `files` of device/, after its constants and what GPU it is for."""
    return "\n".join([definitions(constants), primitives(widths), *map(_text, files)])

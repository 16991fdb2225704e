"""Source text of the kernels in CUDA C++: constants as definitions, the primitives, a product for each width, the kernel.

NVRTC gets one text and no folders. A wgmma names each of its registers, so the products are written here:
    template <> struct Mma<W>  run(part, a, b, go_on): part + a @ b, or a @ b, of 64 rows and W pairs
                               wait(part): until all products are there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.kernels.activations import Code

DEVICE = Path(__file__).parent / "device"


@functools.cache
def _text(name: str) -> str:
    return (DEVICE / name).read_text()


def definitions(constants: Mapping[str, Any]) -> str:
    """A #define for each, and for the number of each activation; floats to all their digits."""
    named = {code.name: code.value for code in Code} | dict(constants)
    return "".join(f"#define {name} {_literal(value)}\n" for name, value in named.items())


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value!r}f" if isinstance(value, float) else str(value)


def product(width: int) -> str:
    """Mma<width>."""
    sums = width // 2
    registers = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(part[{i}])' for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    return f"""
template <> struct Mma<{width}> {{
  static __device__ __forceinline__ void run(float* part, const u32* a, u64 b, bool go_on) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{sums + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{width}k32.f32.e4m3.e4m3 {{{registers}}}, {{{a}}}, %{sums + 4}, p, 1, 1;\\n}}"
        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)go_on));
  }}
  static __device__ __forceinline__ void wait(float* part) {{
    asm volatile("wgmma.wait_group.sync.aligned 0;" : {outputs} :: "memory");
  }}
}};
"""


def hopper(widths: Sequence[int]) -> str:
    """The primitives, and the products of `widths` pairs."""
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

"""Builds the CPU core (src/moestro/kernels/cpu/csrc) beside the package; the rest is in pyproject.toml.

The core is a plain shared library with a C interface, loaded with ctypes: it links against neither Python nor
PyTorch. Each instruction set is one file with its own compiler flags, chosen at run time. It is optional:
without a compiler, or on a 32-bit or big-endian machine, the package installs and moestro's portable backend
runs. MOESTRO_CPU_FLAGS adds compiler and linker flags; MOESTRO_CPU_BUILD=0 skips the core.
"""

import os
import platform
import re
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("src/moestro/kernels/cpu/csrc")
COMMON = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -pthread"
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vnni -mavx512bf16 -mfma -mf16c -mprefer-vector-width=512"
# GCC 12's AVX-512 headers use undefined registers on purpose and warn about it.
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized"
X86 = {
    "kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "kernels_avx_vnni.cpp": "-mavx2 -mfma -mf16c -mavxvnni",
    "kernels_avx512.cpp": f"{AVX512} {QUIET}",
    "kernels_amx.cpp": f"{AVX512} {QUIET} -mamx-tile -mamx-bf16",
}
ARM = {
    "kernels_neon.cpp": "",  # every 64-bit ARM has it
    "kernels_neon_dot.cpp": "-march=armv8.2-a+dotprod",
    "kernels_neon_bf16.cpp": "-march=armv8.2-a+dotprod+bf16",
}
MACHINES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}  # others: plain C++


def isa_flags() -> dict[str, str]:
    """The files of this machine's instruction sets, each with its flags."""
    return MACHINES.get(platform.machine().lower(), {})


def sources() -> list[str]:
    """The C++ files for this machine's architecture."""
    foreign = {*X86, *ARM} - set(isa_flags())
    return sorted(str(path) for path in CSRC.glob("*.cpp") if path.name not in foreign)


def why_not() -> str | None:
    """Why the core cannot be built for this machine; None if it can."""
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return (
            "the CPU core needs a little-endian processor and 64 bits: "
            f"{platform.machine()} is {sys.byteorder}-endian, this Python has {sys.maxsize.bit_length() + 1} bits. "
            "moestro runs on its portable backend"
        )
    return None


class BuildCore(build_ext):
    """Compiles each file with its instruction set's flags, and links them; no Python module's symbols."""

    def build_extension(self, ext: Extension) -> None:
        if reason := why_not():
            raise CompileError(reason)
        extra, isa = shlex.split(os.environ.get("MOESTRO_CPU_FLAGS", "")), isa_flags()
        objects = []
        for source in ext.sources:
            flags = [*COMMON.split(), *isa.get(Path(source).name, "").split(), *extra]
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, depends=ext.depends, extra_postargs=flags
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        flags = ["-pthread", *extra]
        self.compiler.link_shared_object(objects, target, extra_postargs=flags, target_lang="c++")


class Wheel(bdist_wheel):
    """py3-none-<platform>: the core has a platform and no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def index_page() -> str:
    """The README for a package index, which has neither the repository's files nor its pictures.

    With MOESTRO_REPOSITORY (https://host/owner/name/-/blob/v1.0, say) links lead there; without, they become plain
    words, and pictures are left out: a page of broken links helps nobody.
    """
    text, base = Path("README.md").read_text(), os.environ.get("MOESTRO_REPOSITORY", "").rstrip("/")
    local = r"\]\((?!https?:|#|mailto:)([^)\s]+)\)"
    if base:
        raw = base.replace("/blob/", "/raw/")
        text = re.sub(rf"!(\[[^\]]*){local}", rf"!\1]({raw}/\2)", text)
        return re.sub(local, rf"]({base}/\1)", text)
    text = re.sub(rf"!\[[^\]]*{local}\n*", "", text)
    return re.sub(rf"\[([^\]]*){local}", r"\1", text)


wanted = os.environ.get("MOESTRO_CPU_BUILD", "1") != "0" and sys.platform != "win32"
headers = sorted(map(str, CSRC.glob("*.h")))
core = Extension("moestro.kernels.cpu._core", sources(), depends=headers, language="c++", optional=True)
setup(
    ext_modules=[core] if wanted else [],
    cmdclass={"build_ext": BuildCore, "bdist_wheel": Wheel},
    long_description=index_page(),
    long_description_content_type="text/markdown",
)

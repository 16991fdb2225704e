"""The rooms of the Triton backend: who may import whom, how much a kernel takes, and what a new format or path touches."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from moestro.kernels import triton
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.paths import PATHS

ROOT = Path(inspect.getfile(triton)).parent
PACKAGE = "moestro.kernels.triton."
FLOORS = (
    "device",
    "words",
    "layout",
    "tactic",
    "chip",
    "fp8_layout",
    "c_library",
    "nvrtc",
    "cuda_driver",
    "cuda",
    "cuda_source",
    "call",
    "paths",
    "choose",
    "counters",
    "graphs",
    "replay",
    "runner",
)  # each on those before


def room(module: str) -> str:
    return module.removeprefix(PACKAGE).split(".")[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            yield room(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE[:-1]:
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downwards(floor: str) -> None:
    files = list((ROOT / floor).glob("*.py")) or [ROOT / f"{floor}.py"]
    below = {*FLOORS[: FLOORS.index(floor) + 1]}
    assert {name for path in files for name in imports(path)} <= below


def kernels() -> dict[str, Any]:
    """Every function of device/ that is launched: those with a PDL, which `call.add` gives."""
    found = {}
    for path in sorted((ROOT / "device").glob("*.py")):
        module = import_module(f"{PACKAGE}device.{path.stem}")
        for name in re.findall(r"(?:^|\n)(?:@\S+jit\([^\n]*\)|@\S+\.jit)\ndef (\w+)\(", path.read_text()):
            function = getattr(getattr(module, name), "fn", None)
            if (
                function is not None
                and not name.startswith("_")
                and "PDL" in inspect.signature(function).parameters
            ):
                found[f"{path.stem}.{name}"] = function
    return found


def test_no_kernel_takes_more_than_fifteen_arguments() -> None:
    counted = {name: len(inspect.signature(function).parameters) for name, function in kernels().items()}
    assert {"fused.moe_gemm", "chain.moe_chain", "warp_specialized.wide_gemm"} <= set(counted)
    assert {name: n for name, n in counted.items() if n > 15} == {}


def test_a_weight_format_is_named_where_it_is_packed_and_where_it_is_decoded_and_nowhere_else() -> None:
    """But for FP8 activations, whose products and default differ by format, and W4A4, which is about one."""
    wanted = re.compile(r"\b(MXFP4|MXFP8|FP8_BLOCK|FP8Block|INT4|mxfp4|mxfp8|fp8_block|int4)\b")
    code = {
        path.relative_to(ROOT).as_posix(): ast.unparse(ast.parse(path.read_text()))
        for path in ROOT.rglob("*.py")
        if not path.stem.startswith("fp8")
    }
    assert {name for name, text in code.items() if wanted.search(text)} - {"choose.py"} == {
        "layout.py",
        "device/decode.py",
    }


def test_paths_and_layouts_are_found_by_their_names() -> None:
    assert all(path.NAME == name for name, path in PATHS.items())
    assert len({packed.layout for packed in PACKED.values()}) == len(PACKED)
    assert all(packed.layout.startswith("triton-") for packed in PACKED.values())

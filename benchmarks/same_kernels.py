"""The code of every kernel that a tree ships decisions or defaults for: whether a change of device code changes one.

    PYTHONPATH=/tmp/t36:OLD/src python benchmarks/same_kernels.py old.json     # /tmp/t36 holds triton 3.6.0
    PYTHONPATH=/tmp/t36:NEW/src python benchmarks/same_kernels.py new.json --against old.json

Nothing runs and no GPU is needed: each launch is compiled for sm_90, to PTX, without line numbers and without ptxas, or by
NVRTC.
Kernels are those of the shipped bundles' tactics (of the formats that they are for) and of the defaults, for each format and
input format, on sizes with whole and with ragged blocks. Exit status 1 if a kernel of the old tree is missing or another.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels" / "triton"))

FORMATS = ("nvfp4", "bf16", "mxfp4", "fp8_block", "mxfp8")
DECODING = ("moe_gemm", "moe_chain", "wide_gemm", "expand", "fp8_gemm", "fp4_fp8_gemm")
SHIPPED = ("nvfp4", "bf16")  # formats that bundles have decisions for
SIZES = ((8, 2, 512, 320), (4, 2, 160, 96))  # E, K, H, I
TOKENS = (1, 4, 16, 60, 256, 700, 4096, 16384)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument(
        "--sample", action="store_true", help="one kernel of each name and format that decodes weights"
    )
    options = parser.parse_args()
    found = kept(options.out)
    sampled = set()
    for name, launch in launches():
        kind = " ".join(name.split()[:2])
        if options.sample and (kind in sampled or kind.split()[1] not in DECODING):
            continue
        sampled.add(kind)
        if name not in found:
            found[name] = digest(launch)
            options.out.write_text(json.dumps({"tree": tree(), "kernels": found}, indent=0))
    print(len(found), "kernels")
    if options.against is None:
        return 0
    old = json.loads(options.against.read_text())["kernels"]
    bad = [name for name, value in old.items() if found.get(name) != value]
    print(f"{len(old) - len(bad)} of {len(old)} are the same", *bad[:5], sep="\n")
    return len(bad) > 0


@functools.cache
def tree() -> str:
    """A digest of what kernels are made of here."""
    import moestro.kernels.triton as package

    files = sorted(
        path for path in Path(package.__file__).parent.rglob("*.*") if path.suffix in (".py", ".cu", ".cuh")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def kept(path: Path) -> dict[str, str]:
    """What an earlier run of this tree, which was ended, has compiled."""
    if not path.exists():
        return {}
    file = json.loads(path.read_text())
    if file.get("tree") != tree():
        raise SystemExit(
            f"{path} has kernels of tree {file.get('tree')}, this one is {tree()}: name another file"
        )
    kernels: dict[str, str] = file["kernels"]
    print(f"{len(kernels)} kernels are in {path} and not compiled again")
    return kernels


def launches() -> Any:
    """(a name, launch) of every kernel with every set of constants, once."""
    seen = set()
    for fmt in FORMATS:
        for sizes in SIZES:
            for input_format in (None, "fp8", "nvfp4"):
                for runner, tokens, tactic in runs(fmt, sizes, input_format):
                    for launch in runner.plan(inputs(runner, tokens), tactic):
                        constants = sorted((k, repr(v)) for k, v in launch.meta.items())
                        dtypes = [str(arg.dtype) for arg in launch.args if hasattr(arg, "dtype")]
                        name = f"{fmt} {launch.kernel.__name__} {sizes[2] % 64 == 0} {constants} {dtypes}"
                        if name not in seen:
                            seen.add(name)
                            yield name, launch


def runs(fmt: str, sizes: tuple[int, int, int, int], input_format: str | None) -> Any:
    """(runner, tokens, tactic) for all that is valid."""
    from moestro.kernels.triton import choose

    runner = runner_of(fmt, sizes, input_format)
    if runner is None:
        return
    for tokens in TOKENS:
        default = choose.default(runner.problem, tokens)
        shipped = bundled() if fmt in SHIPPED else set()
        fitted = {choose.fitted(runner.problem, t) for t in shipped} | {default}
        for tactic in sorted(
            (t for t in fitted if choose.why_not(runner.problem, t, tokens) is None), key=repr
        ):
            yield runner, tokens, tactic


def bundled() -> set[Any]:
    """The tactics of this tree's shipped decisions."""
    from moestro.kernels.triton import Tactic
    from moestro.tuning.spec.plain_json import from_json
    from moestro.tuning.store import environment

    found = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict) and "object" in value:
            made = from_json(value)
            if isinstance(made, Tactic):
                found.add(made)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    for path in Path(environment.__file__).parents[1].joinpath("bundles").glob("*.json"):
        walk(json.loads(path.read_text()))
    return found


def runner_of(fmt: str, sizes: tuple[int, int, int, int], input_format: str | None) -> Any:
    from types import SimpleNamespace

    import torch

    from moestro import formats
    from moestro.kernels.problem import MoeProblem
    from moestro.kernels.triton import TritonRunner

    experts, top_k, hidden, inter = sizes
    dense = [
        torch.zeros(experts, r, c, dtype=torch.bfloat16) for r, c in ((2 * inter, hidden), (hidden, inter))
    ]
    gate_up, down = (formats.get(fmt).quantize(t) for t in dense)
    dtype = torch.bfloat16 if fmt == "bf16" else None
    p = MoeProblem(experts, experts, 0, top_k, hidden, inter, fmt, input_format=input_format, device="cuda",
                   weight_dtype=dtype)  # fmt: skip
    if TritonRunner._unsupported(p) is not None:
        return None
    names = ("gate_up_bias", "down_bias", "gate_up_input_scale", "down_input_scale")
    rest: dict[str, Any] = dict.fromkeys(names)
    prepared = TritonRunner.prepare(p, SimpleNamespace(gate_up=gate_up, down=down, **rest))
    return TritonRunner(p, SimpleNamespace(gate_up=prepared[0], down=prepared[1], **rest))


def inputs(runner: Any, tokens: int) -> list[Any]:
    from offline import inputs_of

    return inputs_of(runner, tokens)


def digest(launch: Any) -> str:
    """Of the PTX, where ptxas does not run; of the machine code of kernels in CUDA C++, which NVRTC compiles."""
    from offline import compile_launch
    from triton.backends.nvidia.compiler import CUDABackend

    from moestro.kernels.triton.cuda import CudaKernel

    if isinstance(launch.kernel, CudaKernel):
        return hashlib.sha256(launch.compile().cubin.image).hexdigest()[:16]
    if not hasattr(CUDABackend, "whole_stages"):
        CUDABackend.whole_stages, begin = CUDABackend.add_stages, CUDABackend.__init__

        def stages(self: Any, found: dict[str, Any], *rest: Any) -> None:
            self.whole_stages(found, *rest)
            found.pop("cubin")

        def init(self: Any, *args: Any) -> None:
            begin(self, *args)
            self.binary_ext = "ptx"

        CUDABackend.add_stages, CUDABackend.__init__ = stages, init
    ptx = compile_launch(launch).asm["ptx"]
    text = ptx if isinstance(ptx, str) else ptx.decode()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
